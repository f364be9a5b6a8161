"""Models by their name on a hub."""
