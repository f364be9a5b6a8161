"""Checkpoint folders in and out: official ones are read, our own format is read and written."""
