"""mix against NumPy written from the papers, on dense models; and what must come out to the bit."""

import dataclasses
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas import CoordinateDelta, Delta, FactorDelta, SliceDelta, apply, diff, load, mix, revert, save
from jaxsparse.subspaces.targets import matrix_view
from tests.deltas.models import DTYPES, assert_same_bits, assert_same_delta, bits, mixed_pair, with_factors

SHAPE = (3, 8, 10)
VIEW = matrix_view(SHAPE, (0,), (1,), (2,))


def tuned_models(rng, base, count, share=0.4):
    """Models that moved a random part of the weights, which others may have moved too."""
    models = []
    for _ in range(count):
        where = rng.random(base.shape) < share * rng.random()
        moved = base.astype(np.float64) + rng.normal(size=base.shape) * 10.0 ** rng.integers(-4, 2, base.shape)
        models.append(np.where(where, moved.astype(base.dtype), base))
    return models


def wide(dtype):
    return np.promote_types(dtype, np.float32)


def added(base, changes, alone):
    """The base plus changes, rounded once; where one change alone came unscaled, the bits of its tuned model."""
    total = (base.astype(wide(base.dtype)) + changes).astype(base.dtype)
    total = np.where(changes == 0, base, total)
    for owner, tuned in alone:
        total = np.where(owner, tuned, total)
    return total


def task_arithmetic(base, models, weights):
    changes = np.zeros(base.shape, wide(base.dtype))
    moved = [bits(model) != bits(base) for model in models]
    for model, weight in zip(models, weights, strict=True):
        changes += wide(base.dtype).type(weight) * (model.astype(changes.dtype) - base.astype(changes.dtype))
    alone = [
        (own & (sum(moved) == 1), model)
        for own, model, weight in zip(moved, models, weights, strict=True)
        if weight == 1
    ]
    return added(base, changes, alone)


def ties(base, models, weights, density):
    """Algorithm 1 of Yadav et al. 2023, weight by weight."""
    kind = wide(base.dtype)
    trimmed = []
    for model, weight in zip(models, weights, strict=True):
        change = (model.astype(kind) - base.astype(kind)).reshape(-1)
        keep = max(1, round(density * np.count_nonzero(change)))
        largest = np.argsort(-np.abs(change), kind="stable")[:keep]
        kept = np.zeros_like(change)
        kept[largest] = change[largest]
        trimmed.append(kind.type(weight) * kept)
    result = base.reshape(-1).copy()
    for place in range(base.size):
        values = [change[place] for change in trimmed]
        elected = np.sign(np.sum(values, dtype=kind))
        agreeing = [number for number, value in enumerate(values) if elected and np.sign(value) == elected]
        if not agreeing:
            continue
        if len(agreeing) == 1 and weights[agreeing[0]] == 1:
            result[place] = models[agreeing[0]].reshape(-1)[place]
            continue
        total = kind.type(0)
        for number in agreeing:
            total += values[number]
        result[place] = (result[place].astype(kind) + total / kind.type(len(agreeing))).astype(base.dtype)
    return result.reshape(base.shape)


def weight_of(base, delta):
    return np.asarray(apply({"w": base}, delta)["w"])


cases = given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["bfloat16", "float16", "float32", "float64"]),
    st.lists(st.sampled_from([1.0, 1.0, 0.5, -0.7, 0.0, 2.0]), min_size=1, max_size=4),
    st.sampled_from([0.2, 0.9, 1.0]),
)


@settings(deadline=None, max_examples=60)
@cases
def test_sums_are_those_of_dense_models(seed, dtype, weights, share):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=SHAPE).astype(DTYPES[dtype])
    models = tuned_models(rng, base, len(weights), share)
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    weighted = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight]
    expected = task_arithmetic(base, *zip(*weighted, strict=True)) if weighted else base
    mixed = mix(deltas, base={"w": base}, weights=weights)
    assert_same_bits({"w": weight_of(base, mixed)}, {"w": expected})
    assert_same_bits(revert({"w": expected}, mixed), {"w": base})


@settings(deadline=None, max_examples=60)
@cases
def test_ties_is_the_papers(seed, dtype, weights, density):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=SHAPE).astype(DTYPES[dtype])
    models = tuned_models(rng, base, len(weights))
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    mixed = mix(deltas, base={"w": base}, weights=weights, how="ties", density=density)
    assert_same_bits({"w": weight_of(base, mixed)}, {"w": ties(base, models, weights, density)})


def test_ties_with_equal_weights_scales_the_papers_mean(rng):
    base = rng.normal(size=SHAPE).astype(np.float32)
    deltas = [diff({"w": base}, {"w": model}) for model in tuned_models(rng, base, 3)]
    once, half = (mix(deltas, base={"w": base}, weights=[x] * 3, how="ties", density=0.5) for x in (1.0, 0.5))
    np.testing.assert_allclose(weight_of(base, half) - base, 0.5 * (weight_of(base, once) - base), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.25, 1.0])
def test_ties_is_that_of_peft(rng, density):
    """PEFT elects signs before it weighs, so that only equal weights give the same."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft.utils.merge_utils")
    base = np.zeros(SHAPE, np.float32)
    models = [rng.normal(size=SHAPE).astype(np.float32) for _ in range(3)]
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    mixed = weight_of(base, mix(deltas, base={"w": base}, weights=[0.7] * 3, how="ties", density=density))
    # At a density of 1 PEFT warns that nothing is trimmed.
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.ties([torch.from_numpy(model) for model in models], torch.full((3,), 0.7), density)
    np.testing.assert_allclose(mixed, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_dare_drops_or_rescales_every_change(rng):
    base = rng.normal(size=(200, 100)).astype(np.float32)
    models = [base + rng.normal(size=base.shape).astype(np.float32) for _ in range(2)]
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    options = {"base": {"w": base}, "weights": [0.5, 2.0], "how": "dare", "density": 0.3}
    seed = int(rng.integers(2**31))
    mixed = weight_of(base, mix(deltas, seed=seed, **options))
    kept = [np.zeros(base.shape, bool)] * 2
    for number in range(2):
        weights = [0.0, 0.0]
        weights[number] = options["weights"][number]
        alone = weight_of(base, mix(deltas, seed=seed, **options | {"weights": weights}))
        kept[number] = alone != base
        rescaled = np.float32(weights[number]) * (models[number] - base) / np.float32(0.3)
        np.testing.assert_allclose((alone - base)[kept[number]], rescaled[kept[number]], rtol=1e-5, atol=1e-5)
        assert abs(kept[number].mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / base.size)
    # Drawn apart: both are kept as often as chance has it.
    assert abs((kept[0] & kept[1]).mean() - 0.09) < 5 * np.sqrt(0.09 * 0.91 / base.size)
    changes = sum(
        np.where(own, np.float32(weight) * (model - base) / np.float32(0.3), 0)
        for own, model, weight in zip(kept, models, options["weights"], strict=True)
    )
    np.testing.assert_allclose(mixed, base + changes, rtol=1e-5, atol=1e-5)
    assert_same_delta(mix(deltas, seed=seed, **options), mix(deltas, seed=seed, **options))
    assert np.any(weight_of(base, mix(deltas, seed=seed + 1, **options)) != mixed)


@pytest.mark.parametrize("how", ["dare", "dare_ties"])
def test_draws_of_a_tensor_do_not_depend_on_others_nor_on_its_kind(rng, how):
    base = {name: rng.normal(size=SHAPE).astype(np.float32) for name in "abc"}
    tuned = {name: leaf.copy() for name, leaf in base.items()}
    for leaf in tuned.values():
        leaf[:, 2:4] += 1
    options = {"how": how, "density": 0.5, "seed": int(rng.integers(2**31))}
    every = mix([diff(base, tuned)], base=base, **options)
    only = mix([diff({"b": base["b"]}, {"b": tuned["b"]})], base={"b": base["b"]}, **options)
    as_slices = mix([diff(base, tuned, slices=dict.fromkeys("abc", VIEW))], base=base, **options)
    assert isinstance(as_slices.tensors["b"], SliceDelta)
    assert_same_bits(apply(base, every)["b"], apply({"b": base["b"]}, only)["b"])
    assert_same_bits(apply(base, every), apply(base, as_slices))
    assert not np.array_equal(every.tensors["a"].indices, every.tensors["b"].indices)


def test_dare_ties_elects_signs_among_what_was_not_dropped(rng):
    base = rng.normal(size=SHAPE).astype(np.float32)
    models = [base + rng.normal(size=SHAPE).astype(np.float32) for _ in range(3)]
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    whole = mix(deltas, base={"w": base}, how="dare_ties", density=1.0)
    assert_same_bits({"w": weight_of(base, whole)}, {"w": ties(base, models, [1.0] * 3, 1.0)})
    options = {"base": {"w": base}, "density": 0.5, "seed": int(rng.integers(2**31))}
    dropped = [
        weight_of(base, mix(deltas, how="dare", weights=[float(i == j) for j in range(3)], **options)) for i in range(3)
    ]
    mixed = weight_of(base, mix(deltas, how="dare_ties", **options))
    np.testing.assert_allclose(mixed, ties(base, dropped, [1.0] * 3, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("options", [{}, {"overlap": "first"}, {"overlap": "error"}, {"how": "ties", "density": 1.0}])
def test_deltas_that_share_no_weight_keep_their_bits(rng, dtype, options):
    """Weights whose sizes lie far apart: base + (tuned - base) alone would round many of them."""
    spread = 3 if dtype == "float16" else 15

    def weights():
        return (rng.normal(size=SHAPE) * 10.0 ** rng.integers(-spread, spread, SHAPE)).astype(DTYPES[dtype])

    base, owners = jnp.asarray(weights()), rng.integers(0, 4, SHAPE)
    models = [np.where(owners == number, weights(), base) for number in range(3)]
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    expected = np.asarray(base)
    for number, model in enumerate(models):
        expected = np.where(owners == number, model, expected)
    assert_same_bits({"w": weight_of(base, mix(deltas, base={"w": base}, **options))}, {"w": expected})


def test_disjoint_slices_are_mixed_exactly_and_stay_slices(rng):
    base = (rng.normal(size=SHAPE) * 10.0 ** rng.integers(-15, 15, SHAPE)).astype(DTYPES["bfloat16"])
    tuned, models, deltas = base.copy(), [], []
    for own in ([1, 4], [2, 7]):
        models.append(base.copy())
        for model in (models[-1], tuned):
            model[:, own] = (model[:, own].astype(np.float32) * 1.7).astype(base.dtype)
        deltas.append(diff({"w": base}, {"w": models[-1]}, slices={"w": VIEW}))
    mixed = mix(deltas, base={"w": base}, overlap="error")
    assert mixed.tensors["w"].slices.tolist() == [[1, 2, 4, 7]] * 3
    assert_same_bits({"w": weight_of(base, mixed)}, {"w": tuned})


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("view", [VIEW, matrix_view(SHAPE, (), (2,), (0, 1)), matrix_view(SHAPE, (2,), (0,), (1,))])
def test_slices_stay_slices_with_as_many_in_every_matrix(rng, view, axis):
    base = rng.normal(size=SHAPE).astype(np.float32)
    matrices = np.asarray(view.matrices(jnp.asarray(base)))
    deltas, models = [], []
    for _ in range(2):
        moved = matrices.copy()
        for matrix in moved:
            own = matrix if axis == "input" else matrix.T
            own[rng.choice(len(own), 2, replace=False)] += rng.normal(size=own.shape[1]).astype(np.float32)
        models.append(np.asarray(view.weight(jnp.asarray(moved))))
        deltas.append(diff({"w": base}, {"w": models[-1]}, slices={"w": view}))
        assert deltas[-1].tensors["w"].axis == axis
    mixed = mix(deltas, base={"w": base}, weights=[0.5, 1.0])
    tensor = mixed.tensors["w"]
    assert (type(tensor), tensor.axis, tensor.view) == (SliceDelta, axis, view)
    own = [set(row) for row in np.concatenate([d.tensors["w"].slices for d in deltas], axis=1)]
    assert tensor.slices.shape[1] == max(map(len, own))
    assert all(have <= set(row) for have, row in zip(own, tensor.slices, strict=True))
    assert_same_bits({"w": weight_of(base, mixed)}, {"w": task_arithmetic(base, models, [0.5, 1.0])})
    other = diff({"w": base}, {"w": models[0]})
    assert isinstance(mix([deltas[0], other], base={"w": base}, weights=[1.0, 2.0]).tensors["w"], CoordinateDelta)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("view", [VIEW, matrix_view(SHAPE, (), (2,), (0, 1))])
def test_factors_stay_factors(rng, dtype, view):
    base = jnp.asarray(rng.normal(size=SHAPE), dtype)
    tensors = [with_factors(rng, base, view, rank=rank) for rank in (1, 3)]
    tensors[1] = dataclasses.replace(tensors[1], scale=2.0)
    deltas = [diff({"w": base}, {"w": base}, factors={"w": tensor}) for tensor in tensors]
    mixed = mix(deltas, base={"w": base}, weights=[0.5, -1.5])
    tensor = mixed.tensors["w"]
    assert isinstance(tensor, FactorDelta)
    assert tensor.rank == 4
    product = 0.25 * tensors[0].a @ tensors[0].b - 3.0 * tensors[1].a @ tensors[1].b
    expected = np.asarray(base, np.float64) + np.asarray(view.weight(jnp.asarray(product)))
    np.testing.assert_allclose(
        weight_of(base, mixed).astype(np.float64), expected, rtol=1e-5 if dtype == "float32" else 8e-3, atol=1e-4
    )
    assert_same_bits(revert(apply({"w": base}, mixed), mixed, base={"w": base}), {"w": base})
    equal = mix([deltas[0], deltas[0]], base={"w": base}, weights=[0.5, 0.5]).tensors["w"]
    np.testing.assert_array_equal(equal.b, np.concatenate([tensors[0].b] * 2, axis=1))


@pytest.mark.parametrize("view", [VIEW, matrix_view(SHAPE, (), (2,), (0, 1))])
@pytest.mark.parametrize("gain", [False, True])
def test_factors_and_entries_become_entries(rng, view, gain):
    base = rng.normal(size=SHAPE).astype(np.float32)
    low = with_factors(rng, base, view, gain=gain)
    sparse = tuned_models(rng, base, 1)[0]
    deltas = [diff({"w": base}, {"w": base}, factors={"w": low}), diff({"w": base}, {"w": sparse})]
    dense = weight_of(base, deltas[0])
    for weights in ([1.0, 1.0], [0.5, 2.0]):
        mixed = mix(deltas, base={"w": base}, weights=weights)
        assert isinstance(mixed.tensors["w"], CoordinateDelta)
        expected = base + weights[0] * (dense - base) + weights[1] * (sparse - base)
        np.testing.assert_allclose(weight_of(base, mixed), expected, rtol=1e-4, atol=1e-4)
    once = mix(deltas[:1], base={"w": base}, how="ties", density=0.25)
    kept = ties(base, [dense], [1.0], 0.25)
    np.testing.assert_allclose(weight_of(base, once), kept, rtol=1e-4, atol=1e-4)
    first = weight_of(base, mix(deltas, base={"w": base}, overlap="first"))
    assert_same_bits({"w": first}, {"w": dense})
    second = weight_of(base, mix(deltas[::-1], base={"w": base}, overlap="first"))
    np.testing.assert_allclose(second, np.where(sparse != base, sparse, dense), rtol=1e-5, atol=1e-5)


def test_a_single_delta_of_weight_1_is_itself(rng):
    base, tuned, delta = mixed_pair(rng)
    for options in ({}, {"overlap": "error"}, {"how": "dare", "density": 1.0}):
        mixed = mix([delta], base=base, **options)
        assert_same_delta(Delta(mixed.tensors, delta.metadata), delta)
        assert_same_bits(apply(base, mixed), tuned)
    with pytest.raises(InputError, match="deltas 0 and 1 both move"):
        mix([delta, delta], base=base, overlap="error")


def test_the_order_of_deltas_matters_to_rounding_only(rng):
    base = rng.normal(size=SHAPE).astype(np.float32)
    deltas = [diff({"w": base}, {"w": model}) for model in tuned_models(rng, base, 4, 1.0)]
    weights = rng.normal(size=4).tolist()
    order = rng.permutation(4)
    one = weight_of(base, mix(deltas, base={"w": base}, weights=weights))
    other = weight_of(base, mix([deltas[i] for i in order], base={"w": base}, weights=[weights[i] for i in order]))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_what_sums_to_zero_does_not_change():
    base = {"w": np.array([-0.0, 1.0, 2.0], np.float32)}
    delta = diff(base, {"w": np.array([3.0, 1.5, 2.0], np.float32)})
    for options in (
        {"weights": [1.0, -1.0]},
        {"weights": [0.0, 0.0]},
        {"weights": [2.0, -2.0], "how": "ties", "density": 1.0},
    ):
        mixed = mix([delta, delta], base=base, **options)
        assert mixed.entries == 0
        assert_same_bits(apply(base, mixed), base)


def test_the_first_delta_that_moves_a_weight_keeps_it(rng):
    base = rng.normal(size=SHAPE).astype(np.float32)
    models = tuned_models(rng, base, 3, 1.0)
    deltas = [diff({"w": base}, {"w": model}) for model in models]
    expected = base
    for model in models[::-1]:
        expected = np.where(model != base, model, expected)
    assert_same_bits({"w": weight_of(base, mix(deltas, base={"w": base}, overlap="first"))}, {"w": expected})
    with pytest.raises(InputError, match=r"both move [0-9,]+ weights of tensor w; overlap='sum' adds"):
        mix(deltas, base={"w": base}, overlap="error")


def test_metadata_say_what_was_mixed(rng, tmp_path):
    base, _, delta = mixed_pair(rng)
    named = {"math": delta, "code": Delta({}, dataclasses.replace(delta.metadata, method="gasdu"))}
    mixed = mix(named, base=base, weights=[1.0, 0.5], how="dare", density=1.0, seed=3)
    assert (mixed.metadata.method, mixed.metadata.base_name) == ("mix", "tiny")
    assert mixed.metadata.base_fingerprint == fingerprint(base)
    said = {"deltas": ["math", "code"], "methods": ["mixed", "gasdu"], "weights": [1.0, 0.5]}
    assert mixed.metadata.options == said | {"how": "dare", "overlap": "sum", "density": 1.0, "seed": 3}
    save(tmp_path / "mixed", mixed)
    assert_same_delta(load(tmp_path / "mixed", base=base), mixed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "weights must be one for each of the 2 deltas, got 1"),
        ({"weights": [1.0, np.nan]}, "weights must be finite numbers, got nan"),
        ({"how": "mean"}, "how='mean' is not known; possible are sum, ties, dare, dare_ties"),
        ({"overlap": "last"}, "overlap='last' is not known; possible are sum, first, error"),
        ({"density": 0.5}, "density=0.5 has no meaning for how='sum'"),
        ({"how": "ties"}, "how='ties' needs a density"),
        ({"how": "ties", "density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"how": "dare", "density": 1.5}, r"density must lie in \(0, 1\], got 1.5"),
        ({"how": "dare", "density": float("nan")}, r"density must lie in \(0, 1\], got nan"),
        ({"how": "dare", "density": 0.5, "seed": -1}, "seed must not be negative, got -1"),
        ({"how": "ties", "density": 0.5, "overlap": "first"}, "overlap='first' has no meaning for how='ties'"),
        ({"weights": [3e38, 3e38]}, "tensor w: a sum is not finite in float32; scale the changes down"),
        ({"base": {"w": np.zeros(4, np.float32)}}, "cannot mix delta 0: the delta belongs to another base"),
        ({"base": {"v": np.ones(4, np.float32)}}, "cannot mix delta 0: .*"),
    ],
)
def test_what_cannot_be_mixed_is_refused(options, message):
    base = {"w": np.ones(4, np.float32)}
    delta = diff(base, {"w": np.array([1, 2, 3, 100], np.float32)})
    with pytest.raises(InputError, match=message):
        mix([delta, delta], **{"base": base} | options)


def test_nothing_to_mix_is_refused():
    with pytest.raises(InputError, match="deltas is empty"):
        mix([], base={"w": jnp.zeros(3)})


def test_one_tensor_is_in_memory_at_a_time(rng):
    """Sparse deltas of a large tensor cost what their entries cost."""
    base = {name: np.ones((1000, 1000), np.float32) for name in "abcd"}
    deltas = []
    for _ in range(3):
        tuned = jax.tree.map(np.copy, base)
        for leaf in tuned.values():
            leaf.reshape(-1)[rng.choice(leaf.size, 500, replace=False)] = 2
        deltas.append(diff(base, tuned))
    print_ = fingerprint(base)
    tracemalloc.start()
    mix(deltas, base=base, base_fingerprint=print_)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
