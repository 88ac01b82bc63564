"""GaLLoP: elsewhere, forgotten, collapsed."""
