"""NeuroAda, figure 5."""
