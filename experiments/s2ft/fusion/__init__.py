"""S²FT, table 5."""
