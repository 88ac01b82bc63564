"""GASDU, figure 3."""
