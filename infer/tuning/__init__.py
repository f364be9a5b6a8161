"""Choosing by measuring on the user's device where something has several right forms."""
