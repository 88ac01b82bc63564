"""NeuroAda, figure 6."""
