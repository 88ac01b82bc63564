"""Beyond LoRA, tables 3 and 16."""
