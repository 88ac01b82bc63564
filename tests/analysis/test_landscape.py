"""Loss landscapes, on functions and paths that are known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.analysis.landscape import (
    Plane,
    filter_normalise,
    loss_grid,
    path_plane,
    project_path,
    random_plane,
    sharpness,
)
from jaxsparse.common.errors import InputError

TARGETS = [js.Target("layers/kernel", stack_axes=(0,)), "o/kernel"]
SHAPES = {"layers": {"kernel": (2, 5, 4)}, "o": {"kernel": (6, 3)}, "norm": {"scale": (5,)}}


def model(rng: np.random.Generator, scale: float = 1.0) -> dict[str, Any]:
    def draw(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return jax.tree.map(draw, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def moved(params: dict[str, Any], plane: Plane, a: float, b: float) -> dict[str, Any]:
    """The model at a point of the plane, written plainly."""
    layers = params["layers"]["kernel"] + a * plane.first["layers/kernel"] + b * plane.second["layers/kernel"]
    o = params["o"]["kernel"] + a * plane.first["o/kernel"] + b * plane.second["o/kernel"]
    return {"layers": {"kernel": layers}, "o": {"kernel": o}, "norm": params["norm"]}


def flat(direction: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(each, np.float64).ravel() for each in direction.values()])


def loss_fn(params: dict[str, Any], batch: jax.Array) -> jax.Array:
    hidden = jnp.tanh(batch * params["norm"]["scale"])
    for kernel in params["layers"]["kernel"]:
        hidden = jnp.tanh(jnp.pad(hidden @ kernel, ((0, 0), (0, 1))))
    return jnp.mean((jnp.pad(hidden, ((0, 0), (0, 1))) @ params["o"]["kernel"]) ** 2)


def test_every_output_of_a_random_direction_is_as_long_as_the_models(rng: np.random.Generator) -> None:
    params = model(rng, scale=3.0)
    plane = random_plane(params, jax.random.key(int(rng.integers(2**31))), targets=TARGETS)
    for direction in plane:
        assert set(direction) == {"layers/kernel", "o/kernel"}
        for path, axis in (("layers/kernel", 1), ("o/kernel", 0)):
            own, of_model = direction[path], params[path.split("/")[0]]["kernel"]
            np.testing.assert_allclose(jnp.linalg.norm(own, axis=axis), jnp.linalg.norm(of_model, axis=axis), rtol=1e-5)
    cosine = flat(plane.first) @ flat(plane.second) / np.linalg.norm(flat(plane.first)) ** 2
    assert abs(cosine) < 0.7


def test_a_key_decides_on_the_directions(rng: np.random.Generator) -> None:
    params, seed = model(rng), int(rng.integers(2**30))
    again = [flat(random_plane(params, jax.random.key(each), targets=TARGETS).first) for each in (seed, seed, seed + 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.allclose(again[0], again[2])


def test_outputs_that_a_direction_leaves_alone_stay_alone(rng: np.random.Generator) -> None:
    params = model(rng)
    plane = random_plane(params, jax.random.key(0), targets=TARGETS, normalise=False)
    plane.first["o/kernel"] = plane.first["o/kernel"].at[:, 1].set(0)
    normalised = filter_normalise(plane, params, targets=TARGETS)
    assert np.all(np.asarray(normalised.first["o/kernel"])[:, 1] == 0)
    assert np.all(np.asarray(normalised.first["o/kernel"])[:, 0] != 0)


def test_a_path_in_a_plane_is_found_and_drawn_where_it_went(rng: np.random.Generator) -> None:
    origin = model(rng)
    raw = random_plane(origin, jax.random.key(int(rng.integers(2**31))), targets=TARGETS, normalise=False)
    steps = np.cumsum(rng.normal(size=(9, 2)), axis=0)
    steps -= steps[-1]
    path = [moved(origin, raw, a, b) for a, b in steps]
    for point in path:  # what is no target moves too, and is not looked at
        point["norm"] = {"scale": jnp.asarray(rng.normal(size=5), jnp.float32)}
    found = path_plane(path, targets=TARGETS)
    np.testing.assert_allclose(sum(found.explained), 1, atol=1e-5)
    assert found.explained[0] >= found.explained[1]
    u, v = flat(found.plane.first), flat(found.plane.second)
    np.testing.assert_allclose([u @ u, v @ v, u @ v], [1, 1, 0], atol=1e-4)
    # The same points, seen along other axes: distances from the last are kept, and the points are met exactly.
    places = project_path(path, found.plane, targets=TARGETS)
    distances = np.linalg.norm(steps[:, :1] * flat(raw.first) + steps[:, 1:] * flat(raw.second), axis=1)
    np.testing.assert_allclose(np.linalg.norm(places, axis=1), distances, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(project_path(path, raw, targets=TARGETS), steps, rtol=1e-3, atol=1e-3)


def test_explained_variance_agrees_with_a_decomposition_of_the_whole_path(rng: np.random.Generator) -> None:
    path = [model(rng) for _ in range(6)]
    found = path_plane(path, targets=TARGETS)
    rows = np.stack([flat({"l": p["layers"]["kernel"], "o": p["o"]["kernel"]}) for p in path])
    rows = rows[:-1] - rows[-1]
    _, values, vectors = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(found.explained, values[:2] ** 2 / np.sum(values**2), rtol=1e-4)
    for direction, vector in zip(found.plane, vectors, strict=False):
        np.testing.assert_allclose(abs(flat(direction) @ vector), 1, atol=1e-3)


def test_a_grid_holds_the_loss_of_every_point_and_moves_targets_only(rng: np.random.Generator) -> None:
    params = model(rng)
    plane = random_plane(params, jax.random.key(1), targets=TARGETS)
    batches = [jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(2)]
    first, second = np.array([-1.0, 0.0, 0.5]), np.array([0.0, 2.0])
    grid = loss_grid(loss_fn, params, plane, first, second, batches=batches, targets=TARGETS)
    assert grid.shape == (3, 2)
    expected = [
        [np.mean([loss_fn(moved(params, plane, a, b), batch) for batch in batches]) for b in second] for a in first
    ]
    np.testing.assert_allclose(grid, expected, rtol=1e-4)
    assert np.ptp(grid) > 0

    def with_aux(params: dict[str, Any], batch: jax.Array) -> Any:
        return loss_fn(params, batch), {"tokens": 4}

    again = loss_grid(with_aux, params, plane, first, second, batches=batches, targets=TARGETS, has_aux=True)
    np.testing.assert_allclose(again, grid, rtol=1e-6)


def test_a_grid_of_a_quadratic_has_its_curvature(rng: np.random.Generator) -> None:
    params = {"w": jnp.zeros((3, 2))}
    plane = Plane({"w": jnp.zeros((3, 2)).at[0, 0].set(1.0)}, {"w": jnp.zeros((3, 2)).at[2, 1].set(1.0)})
    h = rng.uniform(0.5, 5, size=2)

    def quadratic(params: dict[str, Any], batch: jax.Array) -> jax.Array:
        return batch + 0.5 * (h[0] * params["w"][0, 0] ** 2 + h[1] * params["w"][2, 1] ** 2)

    steps = np.linspace(-2, 2, 9)
    grid = loss_grid(quadratic, params, plane, steps, steps, batches=[jnp.float32(7.0)], targets="w")
    for radius in (1.0, 2.0):
        found = sharpness(grid, steps, steps, radius=radius)
        np.testing.assert_allclose(found.curvature, h.mean(), rtol=1e-3)
        np.testing.assert_allclose(found.largest_increase, h.max() * radius**2 / 2, rtol=1e-3)
        assert 0 < found.mean_increase < found.largest_increase


def test_a_narrower_valley_is_sharper_and_a_tilt_has_no_curvature(rng: np.random.Generator) -> None:
    steps = np.linspace(-1, 1, 11)
    a, b = np.meshgrid(steps, steps, indexing="ij")
    wide, narrow = (1 - np.exp(-(a**2 + b**2) / (2 * width**2)) for width in (1.5, 0.5))
    found = [sharpness(each, steps, steps, radius=1.0) for each in (wide, narrow)]
    for name in ("largest_increase", "mean_increase", "curvature"):
        assert getattr(found[0], name) < getattr(found[1], name)
    assert abs(sharpness(3 * a - b, steps, steps, radius=1.0).curvature) < 1e-9


def test_a_loss_that_explodes_is_infinitely_sharp() -> None:
    steps = np.linspace(-1, 1, 5)
    grid = np.ones((5, 5))
    grid[2, 4] = np.nan
    found = sharpness(grid, steps, steps, radius=1.0)
    assert found.largest_increase == np.inf
    assert np.isnan(found.curvature)
    assert sharpness(grid, steps, steps, radius=0.8).largest_increase == 0


def test_half_precision_weights_keep_their_dtype(rng: np.random.Generator) -> None:
    params = {"w": jnp.asarray(rng.normal(size=(4, 4)), jnp.bfloat16)}
    plane = random_plane(params, jax.random.key(0), targets="w")

    def loss(params: dict[str, Any], batch: jax.Array) -> jax.Array:
        assert params["w"].dtype == jnp.bfloat16
        return jnp.sum(params["w"])

    grid = loss_grid(loss, params, plane, [0.0, 1.0], [0.0], batches=[0], targets="w")
    assert grid[0, 0] != grid[1, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, plane: path_plane([p] * 3, targets="w"), "at least 4 points"),
        (lambda p, plane: path_plane([p] * 5, targets="w"), "straight line"),
        (
            lambda p, plane: path_plane([{"w": s * jnp.eye(3)} for s in (1.0, 2.0, 3.0, 5.0)], targets="w"),
            "straight line",
        ),
        (lambda p, plane: path_plane([p, p, {"w": jnp.ones((2, 2))}, p], targets="w"), "point 2 of the path"),
        (lambda p, plane: path_plane([p, {"w": jnp.full((3, 3), jnp.nan)}, p, p], targets="w"), "NaN or infinity"),
        (lambda p, plane: project_path([], plane, targets="w"), "at least one point"),
        (lambda p, plane: project_path([p], Plane(plane.first, plane.first), targets="w"), "parallel"),
        (lambda p, plane: loss_grid(lambda p, b: 0.0, p, plane, [0.0], [0.0], batches=[], targets="w"), "one batch"),
        (
            lambda p, plane: loss_grid(lambda p, b: 0.0, {"v": p["w"]}, plane, [0.0], [0.0], batches=[0], targets="v"),
            "other targets",
        ),
        (lambda p, plane: sharpness(np.ones((2, 3)), [0.0, 1.0], [0.0, 1.0], radius=1.0), r"losses must be \(2, 2\)"),
        (lambda p, plane: sharpness(np.ones((2, 2)), [0.0, 1.0], [0.5, 1.0], radius=1.0), "must hold 0"),
        (lambda p, plane: sharpness(np.ones((2, 2)), [0.0, 1.0], [0.0, 1.0], radius=1.0), "too few for a curvature"),
        (lambda p, plane: sharpness(np.ones((2, 2)), [0.0, 1.0], [0.0, 1.0], radius=0.0), "radius must be a positive"),
        (
            lambda p, plane: sharpness(np.full((2, 2), np.nan), [0.0, 1.0], [0.0, 1.0], radius=1.0),
            "must be finite, got nan",
        ),
    ],
)
def test_what_cannot_be_drawn_says_why(call: Any, words: str) -> None:
    params = {"w": jnp.eye(3)}
    with pytest.raises(InputError, match=words):
        call(params, random_plane(params, jax.random.key(0), targets="w"))
