"""`python -m infer.selftest`: whether this model computes here what it should."""
