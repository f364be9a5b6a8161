"""`--task cases`: use cases as tests: prompts with checks of their answers."""
