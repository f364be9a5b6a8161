"""Settings every test and every process it starts needs, made before jax is imported."""

import os

# The suite is written for the CPU; `JAX_PLATFORMS=cuda python -m pytest` tries it elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs compiled by an earlier run must not hide a compilation, nor fill the user's cache folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
