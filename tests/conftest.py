"""Fixtures that all tests share."""

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and models, which lies beside the checkout and is never part of it."""
    folder = Path(os.environ.get("JAXSPARSE_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set JAXSPARSE_SHARED")
    return folder


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers for every test, printed on failure so that it can be run again."""
    seed = int(os.environ.get("JAXSPARSE_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    request.node.user_properties.append(("seed", seed))
    print(f"JAXSPARSE_TEST_SEED={seed}")
    return np.random.default_rng(seed)
