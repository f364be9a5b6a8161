"""What other projects call things: names of tensors, configurations, tokenizers."""
