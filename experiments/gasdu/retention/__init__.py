"""GASDU, figure 4."""
