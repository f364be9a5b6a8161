"""`python -m infer.doctor`: what this machine has and is fit for."""
