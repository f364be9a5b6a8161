"""How a prompt becomes an answer: every stage of the model with its shape, cost and values."""
