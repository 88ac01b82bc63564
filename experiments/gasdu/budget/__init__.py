"""GASDU, tables 11 to 13."""
