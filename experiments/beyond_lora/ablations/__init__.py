"""Beyond LoRA, tables 8, 10 and 12, and figure 6."""
