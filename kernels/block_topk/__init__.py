"""The k entries of an array that are largest in magnitude."""
