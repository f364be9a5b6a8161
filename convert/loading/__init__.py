"""From a checkpoint folder to the params of the model."""
