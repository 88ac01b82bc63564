"""What every layer may use: paths of parameters, files, fingerprints, errors."""
