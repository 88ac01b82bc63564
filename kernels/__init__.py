"""Operations on sparse subspaces that depend on jax alone; the fused engine will call them."""
