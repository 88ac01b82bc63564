"""Beyond LoRA, tables 14 and 15."""
