"""Beyond LoRA, tables 2, 4 and 5."""
