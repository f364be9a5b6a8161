"""How fast this device computes a model, beside what it could do at most."""
