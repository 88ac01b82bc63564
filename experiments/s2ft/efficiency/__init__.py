"""S²FT, figure 5."""
