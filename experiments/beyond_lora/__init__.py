"""Beyond LoRA's tables and figures."""
