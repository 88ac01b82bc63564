"""What the methods are measured against: no gradients of the targets at all, and gradients of everything."""

from collections.abc import Callable
from typing import Any

import jax
import optax

__all__ = ["Floor", "FullAdamW"]


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
