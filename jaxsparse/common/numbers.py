"""Numbers for JSON, which knows neither NaN nor infinity."""

import math

__all__ = ["finite_or_none"]


def finite_or_none(value: int | float) -> int | float | None:
    """Returns a number as JSON can hold it.

    Args:
        value: any number.

    Returns:
        The number, or None (null in JSON) for NaN and infinity.

    Example:
        >>> finite_or_none(0.5), finite_or_none(float("nan"))
        (0.5, None)
    """
    return value if math.isfinite(value) else None
