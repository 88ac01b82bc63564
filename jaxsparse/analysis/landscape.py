"""Loss landscapes (Li et al., arXiv 1712.09913; Beyond LoRA, section 4.3 and appendix E.4.1).

A plane through a model is spanned by two directions. Both, and everything computed here, hold target weights only: a
direction takes the memory of the targets in float32 and not of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from jaxsparse.analysis.statistics import as_numbers
from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_positive
from jaxsparse.subspaces.targets import ResolvedTarget, Targets, is_masked, resolve_targets

__all__ = [
    "PathPlane",
    "Plane",
    "Sharpness",
    "filter_normalise",
    "loss_grid",
    "path_plane",
    "project_path",
    "random_plane",
    "sharpness",
]

Direction = dict[str, Num[Array, "..."]]
"""By the path of a target, an array shaped like it."""


class Plane(NamedTuple):
    """Two directions in the space of the targets.

    Attributes:
        first: by path, float32 arrays shaped like the targets.
        second: the same.
    """

    first: Direction
    second: Direction


@dataclass(frozen=True)
class PathPlane:
    """The plane in which most of an optimizer's path lies.

    Attributes:
        plane: the two leading principal components, of length 1 over all targets and at right angles.
        explained: share of the path's variance that each of the two explains, from 0 to 1.
    """

    plane: Plane
    explained: tuple[float, float]


def random_plane(params: Any, key: PRNGKeyArray, *, targets: Targets = None, normalise: bool = True) -> Plane:
    """Draws two directions of normal numbers, filter-normalised unless that is switched off.

    Args:
        params: the model; shapes and, for the normalisation, norms are taken from its targets.
        key: of the draw.
        targets: which weights move.
        normalise: whether `filter_normalise` is applied, as Li et al. and Beyond LoRA do.

    Raises:
        InputError: no weight is a target.

    Example:
        >>> params = {"q_proj": {"kernel": jnp.full((4, 2), 3.0)}, "norm": {"scale": jnp.ones(4)}}
        >>> plane = random_plane(params, jax.random.key(0), targets=".*/kernel")
        >>> list(plane.first), jnp.allclose(jnp.linalg.norm(plane.first["q_proj/kernel"], axis=0), 6.0).item()
        (['q_proj/kernel'], True)
    """
    weights = _weights(params, targets)

    def draw(key: PRNGKeyArray) -> Direction:
        keys = jax.random.split(key, len(weights))
        return {
            target.path: jax.random.normal(each, leaf.shape, jnp.float32)
            for each, (target, leaf) in zip(keys, weights, strict=True)
        }

    plane = Plane(*map(draw, jax.random.split(key)))
    return filter_normalise(plane, params, targets=targets) if normalise else plane


def filter_normalise(plane: Plane, params: Any, *, targets: Targets = None) -> Plane:
    """Gives every filter of both directions the norm of the model's own (Li et al., section 4).

    A filter of a linear layer is what makes one output: a column of a Flax kernel, an output slice. So a step of 1
    along a direction changes every output's weights by as much as they are long, whatever the scale of a layer. Filters
    that a direction leaves alone, because a sparse method did, stay at 0; principal components are no longer at right
    angles afterwards.

    Args:
        plane: the directions.
        params: the model.
        targets: which weights, as when the plane was made.

    Raises:
        InputError: the plane is of other targets.
    """
    weights = _weights(params, targets)
    _check_plane(plane, weights)
    return Plane(
        *({target.path: _scaled(each[target.path], leaf, target) for target, leaf in weights} for each in plane)
    )


@partial(jax.jit, static_argnames=("target",))
def _scaled(direction: Num[Array, "..."], weight: Num[Array, "..."], target: ResolvedTarget) -> Float[Array, "..."]:
    d, w = (target.view.matrices(each).astype(jnp.float32) for each in (direction, weight))
    lengths, wanted = (jnp.linalg.norm(each, axis=1, keepdims=True) for each in (d, w))
    return target.view.weight(d * jnp.where(lengths > 0, wanted / jnp.where(lengths > 0, lengths, 1), 0))


def path_plane(path: Sequence[Any], *, targets: Targets = None) -> PathPlane:
    """Finds the two principal components of an optimizer's path (Beyond LoRA, appendix E.4.1).

    They are those of the rows W⁰ − Wᵀ, …, Wᵀ⁻¹ − Wᵀ, centred, as in Li et al.'s code. Neither paper's text says whether
    rows are centred; what is explained is then the variance about the path's middle. The components are found from the
    products of the rows, one target at a time, so that besides the points themselves two directions are kept, and one
    target's rows for a moment. Every point's targets are read, and nothing else of it.

    Args:
        path: parameters at several steps, the final ones last; factors merged. Trees of the targets alone will do.
        targets: which weights.

    Raises:
        InputError: there are fewer than four points, they differ in shape, or all lie on a straight line.
    """
    if len(path) < 4:
        raise InputError(f"path must hold at least 4 points for two components, got {len(path)}")
    points = [_weights(params, targets) for params in path]
    for at, point in enumerate(points):
        shapes = [{target.path: leaf.shape for target, leaf in each} for each in (points[-1], point)]
        if shapes[0] != shapes[1]:
            raise InputError(f"point {at} of the path has other targets or shapes than the last")
    names = [target.path for target, _ in points[-1]]
    gram = np.zeros((len(path) - 1, len(path) - 1))
    for at in range(len(names)):
        rows = _rows(points, at).astype(np.float64)
        gram += rows @ rows.T
    if not np.isfinite(gram).all():
        raise InputError("path holds NaN or infinity in a target")
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values[::-1], 0.0)
    if values[1] <= 1e-12 * values[0] or not values[0]:
        raise InputError("path lies on a straight line: it has no second principal component")
    combinations = vectors[:, ::-1][:, :2] / np.sqrt(values[:2])
    first, second = {}, {}
    for at, name in enumerate(names):
        shape = points[-1][at][1].shape
        both = combinations.T.astype(np.float32) @ _rows(points, at)
        first[name], second[name] = (jnp.asarray(each.reshape(shape)) for each in both)
    return PathPlane(Plane(first, second), (float(values[0] / values.sum()), float(values[1] / values.sum())))


def _rows(points: list[Any], at: int) -> Float[np.ndarray, "steps size"]:
    """One target's differences from the final point, centred."""
    final = np.asarray(points[-1][at][1], np.float32)
    rows = np.stack([(np.asarray(point[at][1], np.float32) - final).ravel() for point in points[:-1]])
    return rows - rows.mean(axis=0)


def project_path(
    path: Sequence[Any], plane: Plane, *, origin: Any = None, targets: Targets = None
) -> Float[np.ndarray, "steps 2"]:
    """Finds where points lie in a plane: the nearest a and b to each, so that directions need not be at right angles.

    Args:
        path: parameters at several steps.
        plane: the directions.
        origin: the model that the plane goes through; None: the last of the path.
        targets: which weights, as when the plane was made.

    Returns:
        a and b of every point.

    Raises:
        InputError: the path is empty, the plane is of other targets, or its directions are parallel.
    """
    if not path:
        raise InputError("path must hold at least one point, got none")
    centre = {target.path: leaf for target, leaf in _weights(path[-1] if origin is None else origin, targets)}
    products, squares = np.zeros((len(path), 2)), np.zeros((2, 2))
    for at, point in enumerate(path):
        weights = _weights(point, targets)
        _check_plane(plane, weights)
        for target, leaf in weights:
            change = np.asarray(leaf, np.float64).ravel() - np.asarray(centre[target.path], np.float64).ravel()
            products[at] += [np.asarray(each[target.path], np.float64).ravel() @ change for each in plane]
    for name in plane.first:
        both = np.stack([np.asarray(each[name], np.float64).ravel() for each in plane])
        squares += both @ both.T
    if np.linalg.det(squares) <= 1e-9 * squares[0, 0] * squares[1, 1]:
        raise InputError("plane has parallel directions, or one of length 0: no point has a place in it")
    return np.linalg.solve(squares, products.T).T


def loss_grid(
    loss_fn: Callable[..., Any],
    params: Any,
    plane: Plane,
    first: Num[Array | np.ndarray, "..."] | Sequence[float],
    second: Num[Array | np.ndarray, "..."] | Sequence[float],
    *,
    batches: Sequence[Any],
    targets: Targets = None,
    has_aux: bool = False,
) -> Float[np.ndarray, "a b"]:
    """Evaluates the loss on a grid of the plane: at params + a·first + b·second.

    The whole grid is one compiled loop for each batch, which holds one changed copy of the targets at a time. Targets
    keep their dtype: bfloat16 weights are summed in float32 and rounded, so that small steps may change nothing.

    Args:
        loss_fn: loss_fn(params, batch), a scalar, or with has_aux a scalar and something else.
        params: the model in the middle, a and b of 0.
        plane: the directions.
        first: values of a.
        second: values of b. Beyond LoRA takes 51 from −2 to 2 for both.
        batches: what the loss is measured on, each with the same weight.
        targets: which weights, as when the plane was made.
        has_aux: whether loss_fn returns something besides the loss.

    Returns:
        The mean loss over batches, a along the first axis.

    Raises:
        InputError: there are no batches, a value is not finite, or the plane is of other targets.
    """
    if not batches:
        raise InputError("batches must hold at least one batch, got none")
    a, b = as_numbers("first", first), as_numbers("second", second)
    weights = _weights(params, targets)
    _check_plane(plane, weights)
    positions = {target.position: target.path for target, _ in weights}

    @jax.jit
    def losses(params: Any, plane: Plane, points: Float[Array, "points 2"], batch: Any) -> Float[Array, " points"]:
        def at(point: Float[Array, "2"]) -> Float[Array, ""]:
            leaves, treedef = jax.tree.flatten(params, is_leaf=is_masked)
            for position, path in positions.items():
                moved = leaves[position].astype(jnp.float32)
                moved = moved + point[0] * plane.first[path] + point[1] * plane.second[path]
                leaves[position] = moved.astype(leaves[position].dtype)
            loss = loss_fn(jax.tree.unflatten(treedef, leaves), batch)
            return (loss[0] if has_aux else loss).astype(jnp.float32)

        return jax.lax.map(at, points)

    points = jnp.asarray(np.stack(np.meshgrid(a, b, indexing="ij"), axis=-1).reshape(-1, 2), jnp.float32)
    total = sum(np.asarray(losses(params, plane, points, batch), np.float64) for batch in batches)
    return np.asarray(total / len(batches)).reshape(a.size, b.size)


@dataclass(frozen=True)
class Sharpness:
    """How steep a landscape is around its middle, in the loss's unit; a and b are in lengths of the directions.

    Attributes:
        largest_increase: the largest loss within the radius minus the loss in the middle.
        mean_increase: the mean loss within the radius minus the loss in the middle.
        curvature: mean second derivative over the directions of the plane, from a paraboloid fitted within the radius;
            NaN where a loss is not finite.
        points: number of points within the radius.
    """

    largest_increase: float
    mean_increase: float
    curvature: float
    points: int


def sharpness(
    losses: Num[Array | np.ndarray, "..."],
    first: Num[Array | np.ndarray, "..."] | Sequence[float],
    second: Num[Array | np.ndarray, "..."] | Sequence[float],
    *,
    radius: float,
) -> Sharpness:
    """Sums a landscape up, so that two of them can be compared: the larger, the sharper.

    Numbers of different planes are comparable where directions have comparable lengths, as filter-normalised random
    ones have.

    Args:
        losses: what `loss_grid` returned, (a, b).
        first: the values of a; 0 must be among them.
        second: the values of b; 0 must be among them.
        radius: largest distance √(a² + b²) that counts.

    Raises:
        InputError: shapes do not fit, the grid has no middle, its loss is not finite, or fewer than 6 points lie
            within the radius, or on too few lines for a paraboloid.

    Example:
        >>> steps = np.linspace(-1, 1, 5)
        >>> a, b = np.meshgrid(steps, steps, indexing="ij")
        >>> bowl = sharpness(2 * a**2 + b**2, steps, steps, radius=1.0)
        >>> bowl.largest_increase, round(bowl.curvature, 6)
        (2.0, 3.0)
    """
    check_positive("radius", radius)
    a, b = as_numbers("first", first), as_numbers("second", second)
    grid = np.asarray(losses, np.float64)
    if grid.shape != (a.size, b.size):
        raise InputError(f"losses must be ({a.size}, {b.size}), a value for each a and b, got shape {grid.shape}")
    if not (a == 0).any() or not (b == 0).any():
        raise InputError("first and second must hold 0, the middle of the landscape; np.linspace(-1, 1, 51) does")
    middle = grid[np.flatnonzero(a == 0)[0], np.flatnonzero(b == 0)[0]]
    if not np.isfinite(middle):
        raise InputError(f"the loss in the middle of the landscape must be finite, got {middle}")
    x, y = np.meshgrid(a, b, indexing="ij")
    inside = x**2 + y**2 <= radius**2 * (1 + 1e-9)
    x, y, increase = x[inside] / radius, y[inside] / radius, grid[inside] - middle
    terms = np.stack([np.ones_like(x), x, y, x * x / 2, x * y, y * y / 2], axis=1)
    if np.linalg.matrix_rank(terms) < 6:
        raise InputError(f"radius={radius} holds {x.size} points of the grid, too few for a curvature")
    # An infinite or undefined loss is as sharp as can be: it counts as infinite and not as absent.
    increase = np.where(np.isnan(increase), np.inf, increase)
    curvature = float("nan")
    if np.isfinite(increase).all():
        fitted = np.linalg.lstsq(terms, increase, rcond=None)[0]
        curvature = float((fitted[3] + fitted[5]) / 2 / radius**2)
    return Sharpness(float(increase.max()), float(increase.mean()), curvature, x.size)


def _weights(params: Any, targets: Targets) -> list[tuple[ResolvedTarget, Any]]:
    """Targets and their leaves."""
    leaves = jax.tree.leaves(params, is_leaf=is_masked)
    resolved = resolve_targets(params, targets)
    if not resolved:
        raise InputError("params hold no target: every leaf is an optax.MaskedNode")
    return [(target, leaves[target.position]) for target in resolved]


def _check_plane(plane: Plane, weights: list[tuple[ResolvedTarget, Any]]) -> None:
    wanted = {target.path: tuple(leaf.shape) for target, leaf in weights}
    for name, direction in zip(Plane._fields, plane, strict=True):
        own = {path: tuple(each.shape) for path, each in direction.items()}
        if own != wanted:
            different = sorted(set(own.items()) ^ set(wanted.items()))[0]
            raise InputError(f"plane is of other targets: its {name} direction and the model differ in {different}")
