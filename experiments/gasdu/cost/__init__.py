"""GASDU, table 4."""
