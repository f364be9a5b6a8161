"""What training learns from: files of conversations, as token sequences, in batches."""

FORMATS = ("alpaca", "sharegpt", "messages", "adgen")
"""The forms a row may have; `train.data.formats` reads them."""
