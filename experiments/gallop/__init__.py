"""Experiments of GaLLoP."""
