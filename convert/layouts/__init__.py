"""The names and formats of other projects: tensors, configurations, tokenizers."""
