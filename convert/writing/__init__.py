"""Checkpoint folders and GGUF files that are written."""
