"""Search for settings of `train.lora`: many runs, compared by what they do on rows left out."""
