"""The papers' tables and figures, and benchmarks; run as `python -m experiments.NAME`."""
