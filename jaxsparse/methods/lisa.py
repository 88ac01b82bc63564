"""LISA: a few layers at a time, drawn at random."""

import re
from functools import partial

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.engine.description import Description, SlotsDType, SubspaceTransformation
from jaxsparse.engine.layers import Layers, layers_engine
from jaxsparse.select.schedules import Every
from jaxsparse.select.scores import FIRST, Draw, Score
from jaxsparse.subspaces.layers import STACK, WholeLayers
from jaxsparse.subspaces.targets import Targets
from jaxsparse.subspaces.units import Everything

__all__ = ["lisa"]


def lisa(
    inner: optax.GradientTransformation | None = None,
    *,
    layers: int = 2,
    every: int = 20,
    learning_rate: optax.ScalarOrSchedule | None = None,
    stack: str = STACK,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains a few whole layers at a time, drawn at random every K steps, and at all times what is in no layer.

    With S the gamma layers that were drawn, uniformly and without replacement, at the last of the steps 0, K, 2K, ...,

    .. math:: W_l \leftarrow W_l + \mathrm{inner}(\partial L / \partial W_l, W_l), \quad l \in S

    for all weights W_l of a layer, and the same for embedding, final norm and head at every step (LISA, arXiv
    2403.17919, algorithm 1). At every draw the layers' optimizer state starts afresh, that of layers drawn again too,
    and nothing is kept of layers that fall asleep but their weights (METHODS.md; the authors' code leaves the state to
    its optimizer). The state is of the size of gamma layers and of what is in none, not of the model's.

    Args:
        inner: optimizer of the weights; it sees them as parameters, so weight decay acts on them. It keeps one state
            for the layers and one for the rest: a clip by norm inside clips each by its own norm.
        layers: gamma, the number of layers that train at a time; 2 in the authors' code.
        every: K, optimizer steps between draws; 20 in the authors' code.
        learning_rate: if given (a value or a schedule), a step is -learning_rate(step) times what `inner` says, on a
            step count that draws do not restart: `inner=optax.scale_by_adam()` belongs to it.
        stack: regular expression for the path of the stack. Under it (`layers/...`) the first axis counts layers; under
            `layers_3/...` or `layers/3/...` lies layer 3. By default `layers`, `h` or `blocks`, anywhere.
        targets: the weights that may move, in layers or not, of any shape; None: every floating-point parameter.
        slots_dtype: "promote" keeps float32 masters of narrower weights while they train; None keeps none.
        seed: of the draws.

    Returns:
        A gradient transformation with state `js.LayersState`; the leaves of `state.drawn.support` are the layers drawn.

    Raises:
        InputError: layers or every below 1, or a bad `stack`; in `init`: no layers, fewer than `layers`, or layers that
            are not alike.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"embedding": jnp.zeros((9, 4)), "layers": {"kernel": jnp.zeros((6, 4, 4))}}
        >>> tx = js.lisa(optax.sgd(1.0), layers=2, every=10)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> int((updates["layers"]["kernel"] != 0).sum()), int((updates["embedding"] != 0).sum())
        (32, 36)
    """
    check_count("layers", layers)
    check_count("every", every)
    try:
        re.compile(stack)
    except re.error as error:
        raise InputError(f"stack: {stack!r} is no regular expression: {error}") from None

    def draw(draw: Draw) -> jax.Array:
        # One draw for all weights: their own keys differ.
        key = jax.random.fold_in(jax.random.key(seed), draw.turn)
        return jax.random.uniform(key, (draw.stack, draw.units))

    description = partial(
        Description,
        name="lisa",
        inner=inner,
        sees="weight",
        learning_rate=learning_rate,
        slots_dtype=slots_dtype,
        seed=seed,
    )
    return layers_engine(
        Layers(
            name="lisa",
            outside=description(subspace=Everything(), score=FIRST),
            drawn=description(
                subspace=WholeLayers(layers),
                score=Score("random layers", draw=draw),
                schedule=Every(every),
                carry="reset",
            ),
            layers=layers,
            stack=stack,
            targets=targets,
        )
    )
