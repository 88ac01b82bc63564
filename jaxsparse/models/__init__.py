"""Language models in plain Flax NNX, as pure functions of their parameters, in and out of files."""
