"""Encodes text to ids and back, and builds the prompts of each family."""
