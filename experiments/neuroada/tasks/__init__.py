"""NeuroAda, tables 2 and 3."""
