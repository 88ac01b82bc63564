"""S²FT, figure 4."""
