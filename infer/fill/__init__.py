"""`python -m infer.fill`: fills the blanks of a text with a GLM base model."""
