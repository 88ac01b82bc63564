"""The fused engine beside Hugging Face's PEFT in torch: same weights, batches and optimizer, steps in turn."""
