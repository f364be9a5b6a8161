"""`python -m infer.doctor`: checks this machine and recommends a command."""
