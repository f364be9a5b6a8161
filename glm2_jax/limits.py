"""How much is computed at once, where there is much to compute: what keeps temporaries small.

The memory plan reckons with these numbers. Needs no jax.
"""

SCORES = 2**25  # of attention, of all rows and heads, in memory at once
KEYS = 1024  # of a block of attention
MLP_ELEMENTS = 2**26  # of the [B, T, 2, F] between the products of an MLP
CHUNK_ELEMENTS = 2**19  # of a weight that a CPU converts at once; they stay in its cache
SLICES = 32  # of a weight's columns, at most, that a CPU multiplies side by side for one row
LANES = 16  # of such a slice, at least: float32 in a vector register
FEW_ROWS = 4  # up to which a GPU multiplies and sums instead of calling a dot
PREFILL_CHUNK = 2048  # tokens of prompts, all rows together, that are read at once
DRAFT = 32  # most tokens that a step drafts and verifies
