"""LoRA adapters and prefixes: reading, writing, attaching."""
