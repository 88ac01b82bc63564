"""Picking supports by statistics over a calibration set, a few targets at a time, before training begins."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import Advance, progress
from jaxsparse.engine.description import Description, SubspaceTransformation
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.places import GlobalPlaces, leaves_of
from jaxsparse.engine.reference import reference_engine
from jaxsparse.engine.selection import score_units
from jaxsparse.engine.slotted import SlotRule, slotted
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget, Targets, resolve_targets

__all__ = ["calibrate", "collect_activations", "collect_gradients", "with_support"]

LossFn = Callable[[Any, Any], Any]


def calibrate(
    loss_fn: LossFn, params: Any, batches: Iterable[Any], method: optax.GradientTransformation, *, at_once: int = 2**30
) -> dict[str, Array] | Any:
    """Picks a method's support by the mean gradient and the activations over a calibration set.

    Dense statistics exist for a few targets at a time, and never for the whole model.

    Args:
        loss_fn: (params, batch) -> loss, or (loss, aux).
        params: the parameters to start from.
        batches: the calibration set; every batch counts the same.
        method: what a constructor returned, such as `js.gallop(...)`.
        at_once: bytes of dense statistics at a time; 1 GiB. A target that is larger alone comes alone.

    Returns:
        The support, for `js.with_support`: an array (stack, ...) for every target's path, or, with scope "global", a
        support over all targets.

    Raises:
        InputError: there are no batches, or the score needs something that is not at hand.
        TypeError: the method does not pick units of matrices.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["kernel"]) ** 2)
        >>> method = js.gallop(optax.adam(1e-3), density=0.25, scope="matrix", targets="kernel")
        >>> params = {"kernel": jnp.array([[4.0, 3.0], [2.0, 0.1]])}
        >>> support = js.calibrate(loss_fn, params, [jnp.ones((3, 2)), jnp.eye(2)], method)
        >>> support["kernel"]
        Array([[3]], dtype=int32)
        >>> tx = js.with_support(method, support)
    """
    description = _units_method(method)
    calibration_set = _not_empty(batches)
    places, empty, _ = description.start(params)
    needs = description.score.needs
    if "activation" in needs and not description.given.get("activation"):
        read = {target.path: target for target in (target.activation_of or target for target in places.targets)}
        activations = _activations(loss_fn, params, calibration_set, list(read.values()))
        description = replace(description, given={**description.given, "activation": activations})
    wants_gradient = "gradient" in needs and not description.given.get("gradient")
    picked: dict[str, Array] = {}
    is_global, pool = isinstance(places, GlobalPlaces), None
    counts, supports = places.counts(empty), [] if is_global else leaves_of(places.targets, empty)
    groups = _groups(places.targets, at_once)
    with progress("calibrating", len(groups) * len(calibration_set) if wants_gradient else len(groups)) as advance:
        for group in groups:
            targets = [places.targets[number] for number in group]
            statistics = _statistics(loss_fn, params, calibration_set, targets, wants_gradient, advance)
            for number, target, gradient in zip(group, targets, statistics, strict=True):
                weight = target.view.matrices(jax.tree.leaves(params)[target.position])
                scores = score_units(
                    description, target, number, counts[number], gradient, weight, jnp.zeros([], jnp.int32)
                )
                if is_global:
                    assert isinstance(places, GlobalPlaces)
                    pool = places.no_pool(empty, scores.dtype) if pool is None else pool
                    pool = places.pooled(pool, number, scores)
                else:
                    picked[target.path] = target.subspace.pick(scores, supports[number], target.view)
    return pool[1] if pool is not None else picked


def with_support(method: optax.GradientTransformation, support: Any) -> SubspaceTransformation:
    """Returns the method with its support given, in place of being picked; it stays, whatever the method's schedule.

    Args:
        method: what a constructor returned.
        support: what `js.calibrate` returned, or for every target's path int32 unit numbers (stack, ...), distinct
            within a matrix: for coordinates flat indices in (in, out) order, for slices their numbers.

    Returns:
        The transformation; it calibrates no more.

    Raises:
        TypeError: the method does not pick units of matrices.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> tx = js.with_support(js.fixed_mask(optax.sgd(1.0), density=0.25, targets="w"), {"w": jnp.array([[2]])})
        >>> params = {"w": jnp.zeros((2, 2))}
        >>> tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)[0]["w"]
        Array([[-0., -0.],
               [-1., -0.]], dtype=float32)
    """
    description = _units_method(method)
    return reference_engine(replace(description, given={"support": support}, calibration_steps=0))


def _not_empty(batches: Iterable[Any]) -> list[Any]:
    """The calibration set as a list: it may be gone through several times."""
    calibration_set = list(batches)
    if not calibration_set:
        raise InputError("batches is empty: calibration needs at least one batch")
    return calibration_set


def _units_method(method: optax.GradientTransformation) -> Description:
    if not isinstance(method, SubspaceTransformation) or not isinstance(method.description, Description):
        description = getattr(method, "description", None)
        got = f"js.{description.name}" if description is not None else type(method).__name__
        raise TypeError(f"expected the result of a constructor whose method picks units of matrices, got {got}")
    return method.description


def _groups(targets: Sequence[ResolvedTarget], at_once: int) -> list[list[int]]:
    """Numbers of targets whose statistics fit together."""
    groups: list[list[int]] = []
    room = 0
    for number, target in enumerate(targets):
        size = 4 * target.view.stack * target.view.size
        if not groups or size > room:
            groups.append([])
            room = at_once
        groups[-1].append(number)
        room -= size
    return groups


def _statistics(
    loss_fn: LossFn,
    params: Any,
    batches: Sequence[Any],
    targets: Sequence[ResolvedTarget],
    wants_gradient: bool,
    advance: Advance,
) -> list[Any]:
    """Mean gradients of some targets as stacks of matrices; where nobody looks at them, only their shapes."""
    if wants_gradient:
        return _mean_gradients(loss_fn, params, batches, targets, advance)
    advance(1)
    leaves = jax.tree.leaves(params)
    # Nothing looks at what these hold: they say the shape.
    return [jax.eval_shape(target.view.matrices, leaves[target.position]) for target in targets]


def collect_gradients(
    loss_fn: LossFn, params: Any, batches: Iterable[Any], targets: Targets = None
) -> dict[str, Float[Array, "..."]]:
    """Returns the mean gradient of every target over a calibration set, for constructors that take `gradients`.

    Args:
        loss_fn: (params, batch) -> loss, or (loss, aux).
        params: the parameters.
        batches: the calibration set; every batch counts the same.
        targets: the weights, as constructors take them.

    Returns:
        For every target's path its dense mean gradient in the parameter's shape, in at least float32.

    Raises:
        InputError: there are no batches.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsparse as js
        >>> js.collect_gradients(lambda p, x: jnp.sum(x @ p["w"]), {"w": jnp.ones((2, 1))}, [jnp.ones((3, 2))], "w")
        {'w': Array([[3.],
               [3.]], dtype=float32)}
    """
    found = resolve_targets(params, targets)
    calibration_set = _not_empty(batches)
    with progress("collecting gradients", len(calibration_set)) as advance:
        means = _mean_gradients(loss_fn, params, calibration_set, found, advance)
    return {target.path: target.view.weight(mean) for target, mean in zip(found, means, strict=True)}


def _mean_gradients(
    loss_fn: LossFn, params: Any, batches: Sequence[Any], targets: Sequence[ResolvedTarget], advance: Advance
) -> list[Array]:
    leaves, structure = jax.tree.flatten(params)
    positions = [target.position for target in targets]

    @jax.jit
    def add(sums: list[Array], leaves: list[Array], batch: Any) -> list[Array]:
        def loss_of(moving: list[Array]) -> Array:
            replaced = list(leaves)
            for at, leaf in zip(positions, moving, strict=True):
                replaced[at] = leaf
            return _loss(loss_fn, jax.tree.unflatten(structure, replaced), batch)

        gradients = jax.grad(loss_of)([leaves[at] for at in positions])
        found = (target.view.matrices(g) for target, g in zip(targets, gradients, strict=True))
        return [total + g.astype(total.dtype) for total, g in zip(sums, found, strict=True)]

    views = [target.view for target in targets]
    sums = [
        jnp.zeros((view.stack, view.in_size, view.out_size), score_dtype(leaves[at].dtype))
        for view, at in zip(views, positions, strict=True)
    ]
    for batch in batches:
        sums = add(sums, leaves, batch)
        advance(1)
    return [total / len(batches) for total in sums]


def _loss(loss_fn: LossFn, params: Any, batch: Any) -> Array:
    result = loss_fn(params, batch)
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class _SquaredActivations(SlotRule):
    """The slots' gradient is the sum of squares of every input, over the tokens that the loss depends on."""

    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        """Returns sum_t x_t^2; padding after the last target has dL/dy = 0 and does not count."""
        dtype = slots.dtype
        counts = jnp.any(right != 0, axis=-1, keepdims=True)
        return jnp.sum(jnp.where(counts, jnp.square(left.astype(dtype)), 0), axis=0)


def collect_activations(
    loss_fn: LossFn, params: Any, batches: Iterable[Any], targets: Targets = None
) -> dict[str, Float[Array, "stack inputs"]]:
    """Returns the 2-norm of every input of every target over a calibration set, on any model, without its doing.

    Tokens on which the loss does not depend, such as padding, do not count.

    Args:
        loss_fn: (params, batch) -> loss, or (loss, aux).
        params: the parameters.
        batches: the calibration set.
        targets: the weights, as constructors take them.

    Returns:
        For every target's path (stack, in) in at least float32, for constructors that take `activations`.

    Raises:
        InputError: there are no batches.
        UnsupportedUseError: a target is used other than in a product.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxsparse as js
        >>> batch = jnp.array([[3.0, 1.0], [4.0, 0.0]])
        >>> js.collect_activations(lambda p, x: jnp.sum(x @ p["w"]), {"w": jnp.ones((2, 1))}, [batch], "w")
        {'w': Array([[5., 1.]], dtype=float32)}
    """
    calibration_set = _not_empty(batches)
    return _activations(loss_fn, params, calibration_set, resolve_targets(params, targets))


def _activations(
    loss_fn: LossFn, params: Any, batches: Sequence[Any], found: Sequence[ResolvedTarget]
) -> dict[str, Array]:
    leaves, structure = jax.tree.flatten(params)
    rule = _SquaredActivations()

    @jax.jit
    def squares(leaves: list[Array], batch: Any) -> list[Array]:
        def loss_of(probes: list[Array]) -> Array:
            replaced: list[Any] = list(leaves)
            for target, probe in zip(found, probes, strict=True):
                replaced[target.position] = slotted(leaves[target.position], target.view, probe, rule, target.path)
            of_batch = followed(lambda params: _loss(loss_fn, params, batch))
            return of_batch(jax.tree.unflatten(structure, replaced))

        views = [(target.view, score_dtype(leaves[target.position].dtype)) for target in found]
        return jax.grad(loss_of)([jnp.zeros((view.stack, view.in_size), dtype) for view, dtype in views])

    with progress("collecting activations", len(batches)) as advance:
        sums: list[Any] = [0.0] * len(found)
        for batch in batches:
            sums = [total + part for total, part in zip(sums, squares(leaves, batch), strict=True)]
            advance(1)
    return {target.path: jnp.sqrt(total) for target, total in zip(found, sums, strict=True)}
