"""What a tuner knows of the delta that it made, and `diff` cannot see: factors, and which weights move as slices."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import diff
from jaxsparse.deltas.tensors import FactorDelta
from jaxsparse.engine.description import Description
from jaxsparse.subspaces.targets import MatrixView, tree_size
from jaxsparse.subspaces.units import Slices

__all__ = ["OwnDelta"]


class OwnDelta:
    """The part of a tuner that tells what it changed."""

    description: Any

    def params(self, state: Any) -> Any:
        """Returns the model's parameters."""
        raise NotImplementedError

    def factors(self, state: Any, tuned: Any) -> dict[str, FactorDelta]:
        """Returns the deltas of the weights whose change is kept as factors, by path; `tuned`: `self.params(state)`."""
        return {}

    def delta(
        self,
        state: Any,
        base: PyTree | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        base_name: str | None = None,
        base_fingerprint: str | None = None,
    ) -> Delta:
        """Returns what training changed: factors of low-rank methods, slices as slices, else single entries.

        Methods that merge into the weights what a chain learnt, or begin by taking their product off the base, have no
        factors of the whole change: they give the entries that changed. So does the reference engine of low-rank
        methods.

        Args:
            state: of the tuner.
            base: the parameters that training began with. A tuner that leaves them as they are (`js.fuse` with lora,
                lora_plus, asym_lora, dora, lora_one) needs none.
            options: the method's options, for the record; what JSON can hold.
            base_name: the base's name, for people.
            base_fingerprint: `fingerprint(base)` where it is known already.

        Raises:
            InputError: the base is needed and not given, or is another.

        Example:
            >>> import jax.numpy as jnp, optax
            >>> import jaxsparse as js
            >>> def loss_fn(params, batch):
            ...     return jnp.mean((batch @ params["kernel"]) ** 2)
            >>> base = {"kernel": jnp.ones((8, 3))}
            >>> tuner = js.fuse(loss_fn, js.paca(optax.sgd(0.1), rank=2, targets="kernel"))
            >>> state, _ = tuner.step(tuner.init(base), jnp.ones((2, 8)))
            >>> tuner.delta(state, base).tensors["kernel"].slices.shape
            (1, 2)
        """
        tuned = self.params(state)
        factors = self.factors(state, tuned)
        if base is None and not factors:
            raise InputError(
                f"{self.description.name} writes what it learns into the weights: give delta(state, base) "
                "the parameters that training began with"
            )
        known: PyTree = state.params if base is None else base
        return diff(
            known,
            tuned,
            slices=self._slices(known),
            factors=factors,
            method=self.description.name,
            options=options,
            budget=self._budget(known),
            base_name=base_name,
            base_fingerprint=base_fingerprint or fingerprint(known),
            step=int(state.method.progress.steps),
        )

    def _slices(self, params: PyTree) -> dict[str, MatrixView]:
        if not isinstance(self.description, Description):
            return {}
        targets = self.description.resolve(params)
        return {target.path: target.view for target in targets if isinstance(target.subspace, Slices)}

    def _budget(self, params: PyTree) -> float:
        slots = sum(leaf.size for leaf in jax.tree.leaves(self.description.slots(params)))
        return min(1.0, slots / tree_size(params))
