"""NeuroAda, figure 7."""
