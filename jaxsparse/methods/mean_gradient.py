"""Where a mean gradient over calibration data comes from: handed in, or from the first updates."""

from collections.abc import Mapping
from typing import Any

from jaxsparse.common.errors import InputError

__all__ = ["mean_gradient"]


def mean_gradient(name: str, gradients: Mapping[str, Any] | None, calibration_steps: int) -> dict[str, Any]:
    """Returns the fields of a description that picks by a mean gradient.

    Args:
        name: the method's.
        gradients: mean gradients by parameter path, or None.
        calibration_steps: so many first updates change nothing where no gradients are handed in.

    Raises:
        InputError: neither gradients nor calibration steps.

    Example:
        >>> mean_gradient("saft", None, 3)
        {'calibration_steps': 3}
    """
    if gradients is not None:
        return {"given": {"gradient": gradients}}
    if calibration_steps < 1:
        raise InputError(f"{name} needs gradients, or calibration_steps of at least 1, got {calibration_steps}")
    return {"calibration_steps": calibration_steps}
