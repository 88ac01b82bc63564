"""GASDU, tables 1 and 2."""
