"""S²FT, figure 6."""
