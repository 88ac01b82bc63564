"""A model on its device with deltas beside it, one of which is applied: switching copies nothing to the host."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.bits import Flips
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.patch import check_base
from jaxsparse.deltas.tensors import CoordinateDelta, SliceDelta

__all__ = ["Live", "live"]


@dataclass(frozen=True, eq=False)
class Live:
    """A model that switches between deltas; made by `live`.

    Attributes:
        params: the parameters, with the current delta applied.
        current: the name of that delta; None: the base.
    """

    params: PyTree
    current: str | None
    _flips: Mapping[str, Mapping[str, Flips]]

    def switch(self, name: str | None) -> "Live":
        """Returns the model with another delta applied, in the same memory: this one must not be used any more.

        Each delta's bits are combined with the weights' by exclusive or, where they lie: no bit comes to the host, and
        the cost is that of both deltas' entries.

        Args:
            name: of the delta; None for the base.

        Raises:
            InputError: there is no such delta.
        """
        if name is not None and name not in self._flips:
            raise InputError(f"there is no delta {name!r}; there are {', '.join(map(repr, self._flips))}")
        if name == self.current:
            return self
        pairs, structure = flatten_with_paths(self.params)
        tensors = dict(pairs)
        for delta in (self.current, name):
            for path, flips in self._flips[delta].items() if delta is not None else ():
                tensors[path] = flips(tensors[path])
        return replace(self, params=jax.tree.unflatten(structure, tensors.values()), current=name)


def live(
    base: PyTree, deltas: Mapping[str, Delta], *, donate: bool = False, base_fingerprint: str | None = None
) -> Live:
    """Returns a model to switch between deltas on, with the base applied at first.

    The deltas are checked here, once, against the base, and then lie beside the model on its devices: 4 bytes and a
    weight's bits an entry.

    Args:
        base: the base's parameters, any tree of JAX arrays.
        deltas: deltas of coordinates and slices, by name.
        donate: take the base's memory; it must not be used any more. By default it is copied.
        base_fingerprint: `fingerprint(base)` where it is known; otherwise it is computed from all of the base.

    Raises:
        InputError: a delta belongs to another base, or keeps factors, out of which no base comes back.

    Example:
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"w": jnp.zeros(3)}
        >>> tuned = {name: {"w": base["w"].at[at].set(1.0)} for at, name in enumerate(["a", "b"])}
        >>> model = live(base, {name: diff(base, each) for name, each in tuned.items()})
        >>> model.switch("a").switch("b").params
        {'w': Array([0., 1., 0.], dtype=float32)}
    """
    tensors = tensors_by_path(base, "base")
    flips: dict[str, dict[str, Flips]] = {}
    needs = any(delta.metadata.base_fingerprint for delta in deltas.values())
    own = base_fingerprint or (fingerprint(base) if needs else None)
    for name, delta in deltas.items():
        check_base(base, delta, base_fingerprint=own)
        flips[name] = {path: _flips(name, path, tensor, tensors[path]) for path, tensor in delta.tensors.items()}
    # An array at two paths, a tied weight, cannot be written in place at one of them.
    uses = Counter(id(leaf) for leaf in tensors.values())
    params = jax.tree.map(lambda leaf: leaf if donate and uses[id(leaf)] == 1 else jnp.copy(leaf), base)
    return Live(params, None, flips)


def _flips(name: str, path: str, tensor: Any, leaf: Any) -> Flips:
    if not isinstance(tensor, CoordinateDelta | SliceDelta):
        raise InputError(
            f"delta {name!r} keeps factors of tensor {path}, out of which no base comes back: use js.deltas.switch"
        )
    if isinstance(leaf, np.ndarray):
        raise InputError(f"tensor {path} is a NumPy array; live models are JAX arrays")
    indices, run = tensor.runs
    return Flips(leaf, indices, tensor.xor.reshape(-1), run)
