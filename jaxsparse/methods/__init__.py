"""A file per paper; every method is four choices."""
