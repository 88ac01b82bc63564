"""Beyond LoRA, figure 4."""
