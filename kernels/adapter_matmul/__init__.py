"""Products with sparse matrices of which every token has its own."""
