"""What the methods are measured against: no gradients of the targets at all, and gradients of everything."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["Floor", "FullAdamW", "MaskedAdamW"]


class Floor:
    """Forward and backward to the first layer, and no gradient of any target.

    It differentiates with respect to the scales of the layers' norms, which costs a sum over tokens each.

    Args:
        loss_fn: (params, batch) -> (loss, aux).
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any]) -> None:
        def step(params: Any, batch: Any) -> tuple[Any, Any]:
            leaves, structure = jax.tree.flatten(params)
            norms = [at for at, leaf in enumerate(leaves) if leaf.ndim == 2 and leaf.shape[0] != max(leaf.shape)]

            def of_norms(scales: list[jax.Array]) -> jax.Array:
                replaced = list(leaves)
                for at, scale in zip(norms, scales, strict=True):
                    replaced[at] = scale
                return loss_fn(jax.tree.unflatten(structure, replaced), batch)[0]

            return params, jax.value_and_grad(of_norms)([leaves[at] for at in norms])

        self.step = jax.jit(step, donate_argnums=0)

    def init(self, params: Any) -> Any:
        """Returns a copy of the parameters: what the step takes and gives back."""
        return jax.tree.map(jax.numpy.copy, params)


class FullAdamW:
    """Full fine-tuning as optax does it: moments and steps in the weights' own dtype, no masters.

    Args:
        loss_fn: (params, batch) -> (loss, aux).
        learning_rate: of AdamW.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any], learning_rate: float = 1e-5) -> None:
        self.optimizer = optax.adamw(learning_rate)

        def step(state: tuple[Any, Any], batch: Any) -> tuple[Any, jax.Array]:
            params, moments = state
            (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
            updates, moments = self.optimizer.update(gradients, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        self.step = jax.jit(step, donate_argnums=0)

    def init(self, params: Any) -> tuple[Any, Any]:
        """Returns a copy of the parameters, and AdamW's moments."""
        return jax.tree.map(jax.numpy.copy, params), self.optimizer.init(params)


class MaskedAdamW:
    """Mask-based sparse fine-tuning as NeuroAda describes it: dense gradients, of which a mask leaves little.

    "Applies binary masks to zero out the gradients of unselected (frozen) parameters" (section 4); moments are dense
    (equation 5).

    Args:
        loss_fn: (params, batch) -> (loss, aux).
        is_target: (path of jax.tree_util, leaf) -> whether a leaf trains.
        k: inputs of every neuron that train, those with the largest weights.
        learning_rate: of AdamW.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], Any],
        is_target: Callable[[Any, jax.Array], bool],
        k: int,
        learning_rate: float = 1e-5,
    ) -> None:
        self.optimizer, self._is_target, self._k = optax.adamw(learning_rate, weight_decay=0.0), is_target, k

        def step(state: tuple[Any, Any, Any], batch: Any) -> tuple[Any, jax.Array]:
            params, moments, masks = state
            leaves, structure = jax.tree.flatten(params)

            def of_targets(own: list[jax.Array]) -> Any:
                merged = [leaf if new is None else new for leaf, new in zip(leaves, own, strict=True)]
                return loss_fn(jax.tree.unflatten(structure, merged), batch)

            own = [None if mask is None else leaf for leaf, mask in zip(leaves, masks, strict=True)]
            (loss, _), gradients = jax.value_and_grad(of_targets, has_aux=True)(own)
            gradients = jax.tree.map(lambda gradient, mask: gradient * mask, gradients, masks)
            updates, moments = self.optimizer.update(gradients, moments, own)
            moved = optax.apply_updates(own, updates)
            leaves = [leaf if new is None else new for leaf, new in zip(leaves, moved, strict=True)]
            return (jax.tree.unflatten(structure, leaves), moments, masks), loss

        self.step = jax.jit(step, donate_argnums=0)

    def init(self, params: Any) -> tuple[Any, Any, Any]:
        """Returns a copy of the parameters, AdamW's dense moments, and the masks, a byte an entry."""

        def mask_of(path: Any, leaf: jax.Array) -> jax.Array | None:
            if not self._is_target(path, leaf):
                return None
            least = jnp.sort(jnp.abs(leaf), axis=-2)[..., -self._k, None, :]
            return jnp.abs(leaf) >= least

        masks = jax.tree.leaves(jax.tree_util.tree_map_with_path(mask_of, params), is_leaf=lambda leaf: leaf is None)
        own = [None if mask is None else leaf for leaf, mask in zip(jax.tree.leaves(params), masks, strict=True)]
        return jax.tree.map(jnp.copy, params), self.optimizer.init(own), masks
