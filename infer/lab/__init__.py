"""`python -m infer.lab`: what acceleration ideas cost in quality and buy in speed."""
