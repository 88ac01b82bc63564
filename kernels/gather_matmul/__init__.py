"""Products with a sparse matrix that never exists as a whole."""
