"""One forward and backward pass that returns gradients of slots, and where picking is due the new supports."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.engine.description import Description
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.micro_batches import split_batch
from jaxsparse.engine.reference import ratio
from jaxsparse.engine.sharding import Divided
from jaxsparse.engine.single_use import check_used_once
from jaxsparse.engine.slot_rules import BlockSlots, EntrySlots, PickedSlots, SliceSlots
from jaxsparse.engine.slotted import SlotRule, slotted
from jaxsparse.select.schedules import Adaptive, Progress
from jaxsparse.select.scores import GRADIENT, score_dtype
from jaxsparse.subspaces.blocks import Blocks
from jaxsparse.subspaces.targets import ResolvedTarget
from jaxsparse.subspaces.units import Coordinates, Everything, Neurons, Slices

__all__ = [
    "Backward",
    "Energies",
    "mean_backward",
    "micro_batch_shapes",
    "picks_in_backward",
    "retained",
    "sketches",
    "slot_gradients",
]


class Backward(NamedTuple):
    """What a backward pass finds.

    Attributes:
        loss: mean loss of the batch.
        tokens: target tokens of the batch.
        supports: for every target the support that its gradients belong to.
        gradients: for every target the gradients of its slots, in at least float32.
        energies: of the gradients that supports are picked by, or None if none are picked by gradients.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    supports: list[Int[Array, "..."]]
    gradients: list[Float[Array, "..."]]
    energies: "Energies | None"


class Energies(NamedTuple):
    """Sums of squares of gradients, for every target those of each of its matrices.

    With micro-batches they are those of the first, by which supports are picked.

    Attributes:
        kept: of the slots' gradients.
        whole: of the whole gradients: exact where a support was picked, else an estimate or 0.
    """

    kept: list[Float[Array, " stack"]]
    whole: list[Float[Array, " stack"]]


def picks_in_backward(description: Description) -> bool:
    """Whether supports are picked by the gradient inside the backward pass."""
    given = description.given
    return "gradient" in description.score.needs and not given.get("gradient") and given.get("support") is None


def sketches(description: Description) -> bool:
    """Whether retention is estimated on steps that pick nothing: schedules that wait for it to fall need that."""
    return isinstance(description.schedule, Adaptive) and picks_in_backward(description)


def slot_gradients(
    loss_fn: Callable[[Any, Any], tuple[Array, Array]],
    description: Description,
    targets: Sequence[ResolvedTarget],
    params: Any,
    supports: list[Array],
    due: Bool[Array, ""],
    batch: Any,
    micro_batches: int = 1,
    step: Int[Array, ""] | int = 0,
    divided: Sequence[Divided | None] | None = None,
) -> Backward:
    """Differentiates a loss with respect to slots.

    Args:
        loss_fn: (params, batch) -> (loss, tokens).
        description: the method.
        targets: the weights that may move, with their subspaces.
        params: the parameters.
        supports: for every target the support as it stands.
        due: whether supports are to be picked by this gradient, if they are by any.
        batch: the batch; with micro-batches their number must divide the leading axis of its arrays.
        micro_batches: how many; supports are picked on the first, gradients are means weighed by tokens.
        step: number of the step, from which the randomness of estimates is drawn.
        divided: how the targets are divided between devices.

    Raises:
        UnsupportedUseError: the model uses a target in a way that cannot be followed.
    """
    leaves, structure = jax.tree.flatten(params)
    picks = picks_in_backward(description)
    parts = divided or [None] * len(targets)

    def loss_of(probes: list[Any], supports: list[Array], due: Array, batch: Any) -> tuple[Array, Array]:
        wrapped: list[Any] = list(leaves)
        for target, probe, support, part in zip(targets, probes, supports, parts, strict=True):
            leaf = leaves[target.position]
            wrapped[target.position] = _wrap(description, target, leaf, probe, support, due, step, part)
        return followed(loss_fn)(jax.tree.unflatten(structure, wrapped), batch)

    def one(supports: list[Array], due: Array, batch: Any) -> Backward:
        probes = [
            _probe(target, leaves[target.position], s, picks) for target, s in zip(targets, supports, strict=True)
        ]
        (loss, tokens), found = jax.value_and_grad(loss_of, has_aux=True)(probes, supports, due, batch)
        return _unpacked(targets, loss, tokens, found, supports, picks)

    if picks:
        check_used_once(loss_fn, params, micro_batch_shapes(batch, micro_batches), targets)
    return mean_backward(one, supports, due, batch, micro_batches)


def mean_backward(
    one: Callable[[list[Array], Bool[Array, ""], Any], Backward],
    supports: list[Array],
    due: Bool[Array, ""],
    batch: Any,
    micro_batches: int,
) -> Backward:
    """Returns the mean over micro-batches, each weighed by its tokens; supports are picked on the first.

    Args:
        one: (supports, whether they are to be picked, micro-batch) -> what its backward pass finds.
        supports: for every target the support as it stands.
        due: whether supports are to be picked.
        batch: the batch.
        micro_batches: how many parts the leading axis of its arrays is split into.
    """
    if micro_batches == 1:
        return one(supports, due, batch)

    def add(carry: Any, micro_batch: Any) -> tuple[Any, None]:
        supports, due, sums = carry
        found = one(supports, due, micro_batch)
        loss, gradients, energies, tokens, is_first = sums
        loss, gradients = jax.tree.map(
            lambda total, leaf: total + leaf * found.tokens, (loss, gradients), (found.loss, found.gradients)
        )
        energies = jax.tree.map(lambda old, new: jnp.where(is_first, new, old), energies, found.energies)
        sums = loss, gradients, energies, tokens + found.tokens, jnp.zeros_like(is_first)
        return (found.supports, jnp.zeros_like(due), sums), None

    shapes = jax.eval_shape(partial(one, supports, due), micro_batch_shapes(batch, micro_batches))
    zeros = jax.tree.map(
        lambda shape: jnp.zeros(shape.shape, score_dtype(shape.dtype)),
        (shapes.loss, shapes.gradients, shapes.energies, shapes.tokens),
    )
    (supports, _, (loss, gradients, energies, tokens, _)), _ = jax.lax.scan(
        add, (supports, due, (*zeros, jnp.array(True))), split_batch(batch, micro_batches)
    )
    count = jnp.maximum(tokens, 1)
    means = jax.tree.map(lambda gradient: gradient / count, gradients)
    return Backward(loss / count, tokens, supports, means, energies)


def retained(progress: Progress, backward: Backward, measured: Array) -> tuple[Array, Array]:
    """Returns retention and its mean over matrices; where nothing is measured, the last measurement stands.

    An estimate may come out above 1, and does not leave here so.
    """
    if backward.energies is None:
        return progress.retention, progress.retention_mean
    parts, whole = (jnp.concatenate(energies) for energies in backward.energies)
    overall = jnp.minimum(ratio(jnp.sum(parts), jnp.sum(whole)), 1).astype(jnp.float32)
    mean = jnp.mean(jnp.minimum(ratio(parts, whole), 1).astype(jnp.float32))
    return jnp.where(measured, overall, progress.retention), jnp.where(measured, mean, progress.retention_mean)


def micro_batch_shapes(batch: Any, micro_batches: int) -> Any:
    """Returns the shapes of one micro-batch."""
    if micro_batches == 1:
        return jax.eval_shape(lambda batch: batch, batch)
    split = jax.eval_shape(lambda batch: split_batch(batch, micro_batches), batch)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), split)


def _wrap(
    description: Description,
    target: ResolvedTarget,
    weight: Array,
    probe: Any,
    support: Array,
    due: Array,
    step: Array | int,
    divided: Divided | None,
) -> Any:
    """A weight as the model is to see it."""
    units, view = target.subspace, target.view
    if isinstance(units, Everything):
        return probe
    slots: dict[str, Any] = {"support": support, "probe": probe}
    rule: SlotRule
    if isinstance(units, Slices):
        rule = SliceSlots(units)
    elif isinstance(units, Blocks):
        _, _, down, across = units.grid(view.in_size, view.out_size)
        rule = BlockSlots(down * across, across)
    elif picks_in_backward(description):
        # Other scores look at more than the gradient: there JAX finds out what devices tell each other.
        divided = divided if description.score == GRADIENT else None
        rule = PickedSlots(view.out_size, description.score, sketches(description), divided)
        slots["due"] = jnp.broadcast_to(due, (view.stack,))
        if rule.sketches:
            seed = jax.random.fold_in(jax.random.fold_in(jax.random.key(description.seed), target.position), step)
            slots["key"] = jax.random.key_data(jax.random.split(seed, view.stack))
        if "weight" in description.score.needs:
            slots["weight"] = view.matrices(weight)
        if "activation" in description.score.needs:
            norms = description.given["activation"][(target.activation_of or target).path]
            slots["activation"] = units.activations(jnp.asarray(norms), view)
    else:
        by_output = isinstance(units, Neurons) and support.shape[-1] == view.out_size
        rule = EntrySlots(view.out_size, by_output)
    return slotted(weight, view, slots, rule, target.path)


def _probe(target: ResolvedTarget, weight: Array, support: Array, picks: bool) -> Any:
    """What the loss is differentiated with respect to, for one target."""
    units, view, dtype = target.subspace, target.view, score_dtype(weight.dtype)
    if isinstance(units, Everything):
        return weight
    if isinstance(units, Coordinates | Neurons):
        value = jnp.zeros(support.shape, dtype)
        if not picks:
            return value
        return {"value": value, "row": value, "column": value, "energy": jnp.zeros((view.stack,), dtype)}
    return jnp.zeros((*support.shape, *units.shape(view)[2:]), dtype)


def _unpacked(
    targets: Sequence[ResolvedTarget], loss: Array, tokens: Array, found: list[Any], supports: list[Array], picks: bool
) -> Backward:
    gradients, picked, energies = [], [], Energies([], [])
    for target, support, probe in zip(targets, supports, found, strict=True):
        if isinstance(target.subspace, Everything):
            probe = target.subspace.cut(target.view.matrices(probe))
        if isinstance(probe, dict):
            place = probe["row"].astype(jnp.int32) * target.view.out_size + probe["column"].astype(jnp.int32)
            support = place.reshape(support.shape)
            energies.whole.append(probe["energy"])
            probe = probe["value"]
            energies.kept.append(jnp.sum(jnp.square(probe), axis=1))
        gradients.append(probe)
        picked.append(support)
    return Backward(loss, tokens, picked, gradients, energies if picks else None)
