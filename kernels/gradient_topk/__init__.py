"""The largest entries of a product of two matrices, without the product."""
