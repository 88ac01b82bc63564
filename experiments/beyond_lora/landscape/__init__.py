"""Beyond LoRA, figures 1, 3 and 8 to 10."""
