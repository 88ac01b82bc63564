"""What a delta is: what changes of every tensor, and what that belongs to."""

import contextlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.tensors import TensorDelta

__all__ = ["Delta", "Metadata"]


def _current_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("jaxsparse", "jax", "numpy", "orbax-checkpoint", "safetensors"):
        # A checkout on the path, say, is not installed.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@dataclass(frozen=True)
class Metadata:
    """Where a delta comes from and what it belongs to. All of it is optional but `versions`.

    Attributes:
        method: the name of the method that made the change, such as "gasdu".
        options: the method's options, as JSON can hold them.
        budget: free coordinates / all parameters, in (0, 1].
        base_name: the base's name, for people.
        base_fingerprint: `jaxsparse.common.fingerprints.fingerprint` of the base.
        step: the optimizer step at which the tuned model was taken.
        versions: what the delta was made with; default: what is installed.

    Raises:
        InputError: a value that is out of range, or that JSON cannot hold.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    base_name: str | None = None
    base_fingerprint: str | None = None
    step: int | None = None
    versions: Mapping[str, str] = field(default_factory=_current_versions)

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(f"budget={self.budget} is not in (0, 1]")
        if self.step is not None and self.step < 0:
            raise InputError(f"step={self.step} is negative")
        for name in ("options", "versions"):
            try:
                plain = json.loads(json.dumps(dict(getattr(self, name)), allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"{name} must be what JSON can hold: {error}") from error
            object.__setattr__(self, name, MappingProxyType(plain))

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as a dict that JSON can hold."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}


def _check_path(path: str) -> None:
    # The paths are never opened as files here, but exporters and viewers downstream may.
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or not path.isprintable() or {".", ".."} & set(parts):
        raise InputError(f"{path!r} is not the path of a parameter; expected one like layers/q_proj/kernel")


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """A tuned model minus its base: immutable, on the host; coordinates and slices are exact bit for bit.

    Attributes:
        tensors: what changes, by the tensor's path, sorted by path; tensors without a change are left out.
        metadata: where it comes from and what it belongs to.

    Raises:
        InputError: a path that no parameter can have.
    """

    tensors: Mapping[str, TensorDelta]
    metadata: Metadata

    def __post_init__(self) -> None:
        for path in self.tensors:
            _check_path(path)
        changed = {path: tensor for path, tensor in sorted(self.tensors.items()) if tensor.entries}
        object.__setattr__(self, "tensors", MappingProxyType(changed))

    @property
    def entries(self) -> int:
        """The number of weights that change, of all tensors."""
        return sum(tensor.entries for tensor in self.tensors.values())

    @property
    def stored(self) -> int:
        """How many weights, or entries of factors, are stored."""
        return sum(tensor.stored for tensor in self.tensors.values())

    @property
    def exact(self) -> bool:
        """Whether `revert` needs no base: no tensor is kept as factors."""
        return all(tensor.exact for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes in host memory, metadata left out."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        origin = "".join(
            f", {name}={value!r}"
            for name in ("method", "base_name", "step")
            if (value := getattr(self.metadata, name)) is not None
        )
        return f"Delta({self.entries:,} entries in {len(self.tensors)} tensors, {self.nbytes:,} bytes{origin})"
