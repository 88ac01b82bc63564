"""NeuroAda, figure 4."""
