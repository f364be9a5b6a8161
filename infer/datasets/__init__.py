"""Rows of data files as conversations, and those as tokens: what is trained and evaluated on."""

FORMATS = ("alpaca", "sharegpt", "messages", "adgen", "prompt")
"""The forms a row may have; `infer.datasets.formats` reads them."""
