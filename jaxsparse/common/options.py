"""What options may be: errors that name the one that is wrong."""

import math
import numbers
from typing import Any

import jax

from jaxsparse.common.errors import InputError

__all__ = ["check_count", "check_positive"]


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raises unless a value is a whole number, and large enough.

    Raises:
        InputError: it is smaller than `least`.
        TypeError: it is traced, or no whole number.

    Example:
        >>> check_count("rank", 8)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be a Python integer, got {value!r}; optax.inject_hyperparams must have it among its "
            "static_args"
        )
    if value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Raises unless a value is a positive number; a traced one passes.

    Raises:
        InputError: it is not positive.
        TypeError: it is no number.

    Example:
        >>> check_positive("alpha", 16.0)
    """
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a positive number, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise InputError(f"{name} must be a positive number, got {value}")
