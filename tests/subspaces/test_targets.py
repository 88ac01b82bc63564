"""Which weights a pattern names, and what a wrong one is told."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.subspaces.targets import Target, resolve_targets

PARAMS = {
    "layers": {
        "self_attn": {"q_proj": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.ones((2, 6))}},
        "mlp": {"up_proj": {"kernel": jnp.ones((2, 4, 8))}},
    },
    "head": {"kernel": jnp.ones((4, 9))},
    "table": {"ids": jnp.ones((4, 4), jnp.int32)},
}


def paths(targets: object) -> list[str]:
    return [target.path for target in resolve_targets(PARAMS, targets)]


def test_a_pattern_must_match_the_whole_path() -> None:
    assert paths("head/kernel") == ["head/kernel"]
    with pytest.raises(js.InputError, match=r"'kernel' matches no parameter.*head/kernel"):
        paths("kernel")


def test_the_first_match_wins() -> None:
    first = Target(r"layers/.*/kernel", stack_axes=(0,), density=0.5)
    second = Target(r"layers/mlp/.*/kernel", stack_axes=(0,), density=0.1)
    with pytest.raises(js.InputError, match="matches no parameter"):
        paths([first, second])  # the second never gets its turn
    resolved = resolve_targets(PARAMS, [second, first])
    assert {target.path: target.density for target in resolved} == {
        "layers/mlp/up_proj/kernel": 0.1,
        "layers/self_attn/q_proj/kernel": 0.5,
    }


def test_default_targets_are_the_attention_projections_of_known_models() -> None:
    assert paths(None) == ["layers/self_attn/q_proj/kernel"]
    unrolled = {"model": {"layers_0": {"self_attn": {"o_proj": {"kernel": jnp.ones((3, 4))}}}}}
    assert [t.path for t in resolve_targets(unrolled, None)] == ["model/layers_0/self_attn/o_proj/kernel"]
    with pytest.raises(js.InputError, match="no known model"):
        resolve_targets({"dense": {"kernel": jnp.ones((3, 4))}}, None)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (r"layers/.*/q_proj/kernel", r"layers/self_attn/q_proj/kernel has shape \(2, 4, 6\): .*stack_axes"),
        ([Target(r".*/bias", stack_axes=(0,))], "not a matrix"),
        (r"table/ids", "dtype int32"),
        ([Target("head/kernel", stack_axes=(5,))], r"stack_axes=\(5,\).*does not fit head/kernel"),
        ([Target("head/kernel", in_axes=(0,), out_axes=(0,))], "named once each"),
        (r"(", "no regular expression"),
        ([], "targets is empty"),
    ],
)
def test_bad_targets_are_named(targets: object, message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        paths(targets)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 3), (2, 4, 2, 3)])
def test_weights_of_any_shape_can_be_taken_whole(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    weight = jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": weight, "count": jnp.zeros(shape, int), "empty": jnp.zeros((0, 2))}
    size = int(np.prod(shape))
    whole = resolve_targets(params, None, whole=True)
    flat = resolve_targets(params, Target("w", in_axes=()))
    for (target,), matrix in ((whole, (1, 1, *shape)[-2:]), (flat, (1, size))):
        matrices = target.view.matrices(weight)
        assert (target.path, matrices.shape) == ("w", (size // int(np.prod(matrix)), *matrix))
        np.testing.assert_array_equal(target.view.weight(matrices), weight)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_matrices_and_weight_are_inverses(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    axes = data.draw(st.permutations(range(len(shape))))
    cut = sorted(data.draw(st.lists(st.integers(1, len(shape) - 1), min_size=1, max_size=2)))
    stack, inputs = (axes[: cut[0]], axes[cut[0] :][:1]) if len(cut) > 1 and cut[0] < len(shape) - 1 else ((), axes[:1])
    outputs = [axis for axis in axes if axis not in {*stack, *inputs}]
    target = Target("w", tuple(inputs), tuple(outputs), tuple(stack))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    (resolved,) = resolve_targets({"w": weight}, [target])
    matrices = resolved.view.matrices(weight)
    assert matrices.shape == (resolved.view.stack, resolved.view.in_size, resolved.view.out_size)
    np.testing.assert_array_equal(resolved.view.weight(matrices), weight)
