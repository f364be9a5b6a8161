"""Bytes on disk: the file formats that checkpoints are stored in."""
