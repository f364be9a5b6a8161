"""What a model needs of a device's memory: the plan, what is free, and what fits instead."""
