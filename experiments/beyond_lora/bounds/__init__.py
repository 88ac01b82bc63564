"""Beyond LoRA, table 1."""
