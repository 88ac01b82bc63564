"""`stack`: names and numbers, padding, and what cannot be put side by side. What it computes: test_serving.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.deltas import diff, stack
from jaxsparse.subspaces.targets import Target, matrix_view
from tests.deltas.models import with_factors


def base_of(rng):
    """Parameters of every shape that a model has."""
    shapes = {
        "kernel": (6, 5),
        "layers/kernel": (3, 6, 5),
        "layers/scale": (3, 5),
        "attention/kernel": (6, 2, 4),
        "bias": (5,),
    }
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def moved(base, name, *places):
    """A delta whose entries at some places of one tensor moved by 1."""
    index = tuple(np.array(places).T)
    return diff(base, {**base, name: base[name].at[index].add(1.0)})


def test_rows_name_their_adapters(rng):
    base = base_of(rng)
    stacked = stack({name: moved(base, "kernel", (0, n)) for n, name in enumerate("abc")}, base=base)
    assert stacked.names == ("a", "b", "c")
    assert stacked.numbers(["c", None, 0, "a", -1]).tolist() == [2, -1, 0, 0, -1]
    assert stack([moved(base, "kernel", (0, 0))] * 2, base=base).names == ("0", "1")
    for row in ("d", 3, -2):
        with pytest.raises(InputError, match=f"there is no adapter {row!r}; there are 'a', 'b', 'c', or None"):
            stacked.numbers([row])


def test_smaller_adapters_are_padded_with_what_changes_nothing(rng):
    base = base_of(rng)
    few, many = moved(base, "kernel", (1, 2)), moved(base, "kernel", (0, 0), (3, 0), (5, 0), (2, 4))
    group = stack({"few": few, "many": many}, base=base).tensors["kernel"].groups["entries"]
    assert group.place.tolist() == [[0, 1]]
    index, values = (np.asarray(group.arrays[name]) for name in ("index", "values"))
    assert index.tolist() == [[[1 * 5 + 2, 30, 30, 30], [0, 15, 25, 14]]]
    np.testing.assert_allclose(values, [[[1, 0, 0, 0], [1, 1, 1, 1]]], rtol=1e-5)


def test_as_many_entries_for_every_output_are_kept_neuron_by_neuron(rng):
    base = base_of(rng)
    inputs = rng.integers(0, 6, 5)
    group = stack([moved(base, "kernel", *zip(inputs, range(5), strict=True))], base=base).tensors["kernel"].groups
    assert group.keys() == {"neurons"}
    assert group["neurons"].arrays["index"][0, 0].tolist() == [inputs.tolist()]


def test_changes_are_kept_in_the_dtype_that_is_asked_for(rng):
    base = {"kernel": jnp.ones((6, 5), jnp.bfloat16)}
    delta = diff(base, {"kernel": base["kernel"].at[2, 3].set(2)})
    for dtype, expected in ((None, "float32"), ("bfloat16", "bfloat16")):
        (group,) = stack([delta], base=base, dtype=dtype).tensors["kernel"].groups.values()
        assert group.arrays["values"].dtype == expected


def test_axes_are_told_by_the_path_or_by_targets(rng):
    base = base_of(rng)
    stacked = stack([moved(base, "layers/kernel", (2, 1, 1))], base=base).tensors["layers/kernel"]
    assert stacked.view == matrix_view((3, 6, 5), (0,), (1,), (2,))
    delta = moved(base, "attention/kernel", (2, 1, 1))
    with pytest.raises(InputError, match=r"tensor attention/kernel has shape \(6, 2, 4\): name its axes by targets="):
        stack([delta], base=base)
    targets = [Target("attention/kernel", in_axes=(0,), out_axes=(1, 2))]
    view = stack([delta], base=base, targets=targets).tensors["attention/kernel"].view
    assert (view.in_size, view.out_size) == (6, 8)


def test_what_cannot_be_stacked_is_an_error(rng):
    base = base_of(rng)
    good = moved(base, "kernel", (0, 0))
    with pytest.raises(InputError, match="there are no deltas to stack"):
        stack([], base=base)
    for name, place in (("layers/scale", (1, 1)), ("bias", (1,))):
        with pytest.raises(InputError, match=f"tensor {name} of shape .* is no matrix"):
            stack({"good": good, "bad": moved(base, name, place)}, base=base)
    other = base_of(rng)
    with pytest.raises(InputError, match="delta 'theirs': the delta belongs to another base"):
        stack({"ours": good, "theirs": moved(other, "kernel", (0, 0))}, base=base)
    view = matrix_view((6, 5), (), (1,), (0,))
    turned = diff(base, base, factors={"kernel": with_factors(rng, base["kernel"], view)})
    straight = diff(
        base, base, factors={"kernel": with_factors(rng, base["kernel"], matrix_view((6, 5), (), (0,), (1,)))}
    )
    with pytest.raises(InputError, match="do not agree which axes are inputs"):
        stack([turned, straight], base=base)
    infinite = diff(base, {**base, "kernel": base["kernel"].at[0, 0].set(jnp.inf)})
    with pytest.raises(InputError, match="not finite"):
        stack([infinite], base=base)
