"""Tables and figures of S²FT."""
