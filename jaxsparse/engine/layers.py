"""Some layers at a time: one description for the layers that are drawn, another for what lies outside the stack."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse.engine.description import Description, Method, SubspaceTransformation
from jaxsparse.engine.places import NOTHING
from jaxsparse.engine.reference import SubspaceState, advance, reference_engine, retention
from jaxsparse.engine.updates import nothing_but
from jaxsparse.select.schedules import Progress
from jaxsparse.subspaces.layers import LayerStack, find_layers
from jaxsparse.subspaces.targets import Targets

__all__ = ["Layers", "LayersState", "layers_engine"]


class LayersState(NamedTuple):
    """State of a method that draws layers.

    Attributes:
        progress: step counts and retention, over both parts.
        outside: state of the weights outside the stack of layers.
        drawn: state of the layers that train; every leaf of `drawn.support` is (1, layers), their numbers, and slots
            follow that order. In trees, the layers of a kind of weight lie together in the place of its first layer.
    """

    progress: Progress
    outside: SubspaceState
    drawn: SubspaceState


@dataclass(frozen=True)
class Layers(Method):
    """A method that trains some layers at a time, and what lies outside the stack at all times.

    Attributes:
        name: the constructor's name.
        outside: how the weights outside the stack train.
        drawn: how the layers that are drawn train; it sees weights with layers on their first axis.
        layers: how many are drawn.
        stack: regular expression for the path of the stack of layers.
        targets: the weights that may move; None: every floating-point weight.
    """

    name: str
    outside: Description
    drawn: Description
    layers: int
    stack: str
    targets: Targets = None

    @property
    def trains(self) -> bool:
        """Whether there is an inner optimizer."""
        return self.outside.trains

    def find(self, tree: Any) -> LayerStack:
        """Returns the layers in a tree shaped like the parameters."""
        return find_layers(tree, self.targets, self.stack, self.layers)

    def moving(self, params: Any) -> list[int]:
        """Returns the positions of all weights: each layer may be drawn."""
        return self.find(params).positions

    def slots(self, params: Any) -> Any:
        """Returns the shapes of the weights outside the stack, and of the layers that are drawn at a time."""
        outside, stack = jax.eval_shape(self.find(params).split, params)
        return self.outside.slots(outside), self.drawn.slots(stack)


def layers_engine(method: Layers) -> SubspaceTransformation:
    """Makes the optax transformation that draws layers and trains them.

    Args:
        method: the method.

    Returns:
        A transformation as of `reference_engine`.
    """
    return SubspaceTransformation(partial(_init, method), partial(_update, method), method)


def _init(method: Layers, params: Any) -> LayersState:
    parts = params, params
    if jax.tree.leaves(params):  # the placeholder of optax.tree.map_params stands for any tree
        parts = jax.eval_shape(method.find(params).split, params)
    outside, drawn = (reference_engine(how).init(part) for how, part in zip(_hows(method), parts, strict=True))
    return LayersState(Progress.start(), outside, drawn)


def _hows(method: Layers) -> tuple[Description, Description]:
    return method.outside, method.drawn


def _update(
    method: Layers, updates: Any, state: LayersState, params: Any = None, **extra_args: Any
) -> tuple[Any, LayersState]:
    stack = method.find(updates)
    gradients = stack.split(updates)
    weights = (None, None) if params is None else stack.split(params)
    steps = zip(_hows(method), gradients, (state.outside, state.drawn), weights, strict=True)
    moves, states = zip(*(reference_engine(how).update(g, s, w, **extra_args) for how, g, s, w in steps), strict=True)

    # Whichever part leaves a step out, the other does too.
    old = state.outside.progress.skipped, state.drawn.progress.skipped
    takes = jnp.array([new.progress.skipped == before for new, before in zip(states, old, strict=True)]).all()
    picked = states[1].progress.refreshes > state.drawn.progress.refreshes
    progress = advance(state.progress, picked, *_retention(stack, gradients, states[1].support))
    skipped = state.progress._replace(skipped=state.progress.skipped + 1)
    taken = LayersState(progress, *states)
    kept = state._replace(progress=skipped)
    new_state = jax.tree.map(partial(jnp.where, takes), taken, kept)

    joined = stack.join(*moves).items()
    changed = {position: jnp.where(takes, move, jnp.array(NOTHING, move.dtype)) for position, move in joined}
    return nothing_but(updates, changed), new_state


def _retention(
    stack: LayerStack, gradients: tuple[Any, Any], support: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How much of the gradients the layers retain that are drawn, with all that lies outside the stack."""
    outside, layers = (jax.tree.leaves(part) for part in gradients)
    awake = jnp.zeros(stack.layers, bool).at[jax.tree.leaves(support)[0][0]].set(True)
    whole = [g[None] for g in outside]
    drawn = [jnp.where(awake.reshape(-1, *[1] * (g.ndim - 1)), g, 0) for g in layers]
    return retention([*whole, *layers], [*whole, *drawn])
