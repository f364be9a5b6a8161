"""Settings every test and every process it starts needs, made before jax is imported."""

import os

# The suite is written for the CPU; `JAX_PLATFORMS=cuda python -m pytest` tries it elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs compiled by an earlier run must not hide a compilation, nor fill the user's cache folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# XLA's programs stay the same to the line, with their memory and their operations; LLVM turns them
# into machine code with less effort, which is much of the suite's time. 0 = as users have it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Several processes of the tests may ask the compiler for TPUs at once; none of them has a chip.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
