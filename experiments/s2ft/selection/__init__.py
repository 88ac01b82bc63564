"""S²FT, table 4."""
