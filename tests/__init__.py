"""The test suite."""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_CHECKS: dict[Any, Callable[..., Any]] = {}


def checked(signature: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype`, remembered: what it makes of a function inside another would be made anew at every call of that.

    Args:
        signature: what jaxtyping (see pyproject.toml) makes of every function of ours: the signature alone, no body.
    """
    key = (signature.__module__, signature.__qualname__, signature.__code__, *signature.__annotations__.items())
    if signature.__defaults__ or signature.__kwdefaults__:  # they are checked too, and may be others
        return beartype(signature)
    if key not in _CHECKS:
        _CHECKS[key] = beartype(signature)
    return _CHECKS[key]
