"""GASDU, table 14."""
