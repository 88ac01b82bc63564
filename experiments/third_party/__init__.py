"""Models that others wrote, tuned as they are: a Flax linen, a Flax NNX and an Equinox model from PyPI."""
