"""Answering: sampling, the engine, and the command-line tools."""
