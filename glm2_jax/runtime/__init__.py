"""The machine: devices, dtypes, memory, the compiler and its cache."""
