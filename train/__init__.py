"""Training: the step, and the bundled demo model."""

from glm2_jax.extras import require_packages

require_packages()
