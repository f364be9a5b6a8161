"""How fast this device computes a model, compared with its measured limits."""
