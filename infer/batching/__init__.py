"""Continuous batching: requests join and leave a fixed batch of slots at any step."""
