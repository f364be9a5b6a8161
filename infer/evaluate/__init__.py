"""`python -m infer.evaluate`: perplexity, generated texts and multiple choice, as figures."""
