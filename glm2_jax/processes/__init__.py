"""One run of several processes: how they join, and how they watch each other. Free of jax."""
