"""The size of a product of two matrices, without the product."""
