"""Turns rows of data files into conversations, and those into tokens, to train and evaluate on."""

FORMATS = ("alpaca", "sharegpt", "messages", "adgen", "prompt")
"""The formats of rows; `glm2_jax.datasets.formats` reads them."""
PREFERENCE = "preference"
"""The format of `glm2_jax.datasets.pairs`."""
TEXT = "text"
"""The format of plain texts, which is only read where it is asked for."""
