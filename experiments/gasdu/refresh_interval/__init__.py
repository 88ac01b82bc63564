"""GASDU, table 3."""
