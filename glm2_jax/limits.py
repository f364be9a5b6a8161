"""How much is computed at once, to keep temporaries small; the memory plan uses these numbers too.

Needs no jax.
"""

SCORES = 2**25  # attention scores in memory at once, of all rows and heads
KEYS = 1024  # keys in a block of attention
MLP_ELEMENTS = 2**26  # of the [B, T, 2, F] between the products of an MLP
CHUNK_ELEMENTS = 2**19  # of a weight that a CPU converts at once; they stay in its cache
SLICES = 32  # most slices of a weight's columns that a CPU multiplies in one loop for one row
LANES = 16  # columns of such a slice, at least: float32 in a vector register
FEW_ROWS = 4  # most rows for which a GPU multiplies and sums instead of calling a dot
LONG_CACHE = 2**14  # tokens of all rows, of which a GPU should not copy keys and values in a step
PREFILL_CHUNK = 2048  # prompt tokens per prefill, all rows together
DRAFT = 32  # most draft tokens per step
