"""Fixtures for the tests of delta files."""

import jax
import numpy as np
import pytest

from jaxsparse.deltas import diff, save
from tests.deltas.models import mixed_pair, small_pair
from tests.deltas.saved import FORMS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, and its delta in both forms, never to be written to."""
    folder = tmp_path_factory.mktemp("saved")
    base, tuned = jax.tree.map(np.asarray, small_pair(np.random.default_rng()))
    delta = diff(base, tuned, method="gasdu", options={"density": 0.1}, base_name="tiny")
    for form in FORMS:
        save(folder / form, delta)
    return folder, base, tuned, delta


@pytest.fixture(scope="module")
def saved_kinds(tmp_path_factory):
    """The same with slices and factors among the tensors."""
    folder = tmp_path_factory.mktemp("saved_kinds")
    base, tuned, delta = mixed_pair(np.random.default_rng())
    for form in FORMS:
        save(folder / form, delta)
    return folder, *jax.tree.map(np.asarray, (base, tuned)), delta
