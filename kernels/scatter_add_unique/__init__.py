"""Adding to single entries of a matrix, or replacing them, in place."""
