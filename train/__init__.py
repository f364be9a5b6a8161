"""Training: the step, and the bundled demo model."""
