"""Text to ids and back, and the prompts of each family."""
