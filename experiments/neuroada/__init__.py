"""Tables and figures of NeuroAda."""
