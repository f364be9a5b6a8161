"""`python -m infer.generate`: answer one prompt or a file of prompts."""
