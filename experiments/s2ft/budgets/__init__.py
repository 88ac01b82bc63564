"""S²FT, figure 2."""
