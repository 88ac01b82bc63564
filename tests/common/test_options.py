"""Options that are numbers: each error names the option and the value."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count, check_positive


@pytest.mark.parametrize("value", [1, 7, np.int32(3)])
def test_whole_numbers_count(value: Any) -> None:
    check_count("rank", value)
    check_positive("alpha", value)


@pytest.mark.parametrize("value", [2.0, "2", True, None, jnp.array(2)])
def test_nothing_else_counts(value: Any) -> None:
    with pytest.raises(TypeError, match="rank must be a Python integer, got"):
        check_count("rank", value)


def test_counts_have_a_least() -> None:
    check_count("calibration_steps", 0, least=0)
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        check_count("rank", 0)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_positive_numbers_are_positive_and_finite(value: float) -> None:
    with pytest.raises(InputError, match="alpha must be a positive number, got"):
        check_positive("alpha", value)


@pytest.mark.parametrize("value", ["16", True, None])
def test_positive_numbers_are_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="alpha must be a positive number, got"):
        check_positive("alpha", value)


def test_a_traced_number_passes_for_positive() -> None:
    check_positive("alpha", jnp.array(-1.0))
