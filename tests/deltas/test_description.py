"""What deltas of all kinds say of themselves and of what they share, against dense models."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.deltas import apply, describe, diff, overlap
from jaxsparse.deltas.description import layer_counts
from jaxsparse.subspaces.targets import matrix_view
from tests.deltas.models import bits, mixed_pair, with_factors

SHAPE = (3, 6, 8)
VIEW = matrix_view(SHAPE, (0,), (1,), (2,))


def test_all_kinds_say_what_they_are(rng):
    base, tuned, delta = mixed_pair(rng)
    said = json.loads(json.dumps(describe(delta)))
    assert said["kinds"] == ["coordinates", "factors", "slices"]
    assert (said["entries"], said["stored"], said["bytes"]) == (delta.entries, delta.stored, delta.nbytes)
    down, low, dora = (said["tensors"][f"{name}/kernel"] for name in ("layers/down", "low", "dora"))
    assert (down["kind"], down["axis"], down["slices"], down["stored"]) == ("slices", "input", 2, 3 * 2 * 10)
    assert (low["kind"], low["rank"], low["gain"], low["stored"], low["density"]) == ("factors", 2, False, 32, 1.0)
    assert (dora["rank"], dora["gain"], dora["layers"]) == (2, True, [])
    assert "rank" not in down
    assert "slices" not in said["tensors"]["layers/q/kernel"]
    for path in ("layers/q/kernel", "layers/down/kernel", "layers/up/kernel"):
        part = path.split("/")[1]
        moved = bits(tuned[path]) != bits(base[path])
        assert said["tensors"][path]["layers"] == np.flatnonzero(moved.any(axis=(1, 2))).tolist(), part
        counts = layer_counts(path, delta.tensors[path])
        assert counts == {layer: (np.count_nonzero(own), own.size) for layer, own in enumerate(moved)}
    assert said["layers"] == [0, 1, 2]


def test_factors_touch_all_layers_of_a_stack(rng):
    base = {"layers": {"kernel": jnp.ones(SHAPE)}}
    tensor = with_factors(rng, base["layers"]["kernel"], VIEW)
    delta = diff(base, base, factors={"layers/kernel": tensor})
    assert describe(delta)["layers"] == [0, 1, 2]
    assert layer_counts("layers/kernel", tensor) == dict.fromkeys(range(3), (48, 48))
    assert layer_counts("layers/7/kernel", tensor) == {7: (144, 144)}
    assert layer_counts("kernel", tensor) == {None: (144, 144)}


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(["coordinates", "slices", "factors", "nothing"]), min_size=1, max_size=4),
)
def test_overlap_counts_what_dense_models_share(seed, kinds):
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(size=SHAPE).astype(np.float32) for name in ("v", "w")}
    deltas, moved = [], []
    for kind in kinds:
        tuned = {name: leaf.copy() for name, leaf in base.items()}
        where = rng.random(SHAPE) < 0.3
        if kind == "slices":
            where = np.broadcast_to((rng.random((3, 6)) < 0.3)[:, :, None], SHAPE)
        tuned["w"][where & (kind != "nothing")] += 1
        factors = {"w": with_factors(rng, base["w"], VIEW)} if kind == "factors" else None
        delta = diff(base, tuned, slices={"w": VIEW} if kind == "slices" else None, factors=factors)
        deltas.append(delta)
        moved.append(np.asarray(apply(base, delta)["w"]) != base["w"])
        if kind == "factors":
            moved[-1][:] = True
    found = overlap({str(10 * number): delta for number, delta in enumerate(deltas)})
    pairs = list(itertools.combinations(range(len(kinds)), 2))
    assert [pair["deltas"] for pair in found] == [[str(10 * one), str(10 * other)] for one, other in pairs]
    for pair, (one, other) in zip(json.loads(json.dumps(found)), pairs, strict=True):
        shared, either = (moved[one] & moved[other]).sum(), (moved[one] | moved[other]).sum()
        assert pair["entries"] == [moved[one].sum(), moved[other].sum()]
        assert pair["shared"] == shared
        assert pair["share"] == (shared / min(pair["entries"]) if min(pair["entries"]) else 0)
        assert pair["jaccard"] == (shared / either if either else 0)
        numbers = {name: pair[name] for name in ("entries", "shared", "share", "jaccard")}
        assert pair["tensors"] == ({"w": numbers} if min(pair["entries"]) else {})


def test_deltas_of_other_models_share_nothing():
    one, other = ({"w": jnp.ones(size)} for size in (3, 4))
    deltas = {name: diff(base, {"w": -base["w"]}) for name, base in (("a", one), ("b", other))}
    with pytest.raises(InputError, match=r"a and b belong to different models: tensor w is of shape \(3,\) in one and"):
        overlap(deltas)
