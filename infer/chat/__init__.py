"""`python -m infer.chat`: a conversation in a terminal."""
