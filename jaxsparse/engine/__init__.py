"""What runs a description: the reference engine, an optax transformation on dense gradients."""
