"""The engine: rows in, tokens out."""
