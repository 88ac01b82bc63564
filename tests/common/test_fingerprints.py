"""A fingerprint changes with any bit, and with nothing else."""

import flax.linen as nn
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsparse.common.fingerprints import StreamedChecksum, fingerprint, tensor_checksum

ARRAYS = hnp.arrays(
    dtype=st.sampled_from([np.float32, np.float16, jnp.bfloat16, np.int32, np.bool_]).map(np.dtype),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
    elements=st.just(0),
)


@hypothesis.given(ARRAYS, st.randoms())
@hypothesis.settings(deadline=None)
def test_checksum_changes_with_any_bit_dtype_and_shape(array, random):
    checksum = tensor_checksum(array)
    assert checksum == tensor_checksum(array.copy())
    bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
    bits[random.randrange(bits.size)] ^= 1 if array.dtype == bool else 1 << random.randrange(8)
    assert checksum != tensor_checksum(bits.view(array.dtype).reshape(array.shape))
    assert checksum != tensor_checksum(array[None])
    if array.dtype == np.float16:
        assert checksum != tensor_checksum(array.view(jnp.bfloat16))


def test_checksum_of_host_device_and_strided_arrays_agree(rng):
    array = rng.standard_normal((5, 7)).astype(np.float32)
    expected = tensor_checksum(array)
    assert tensor_checksum(jnp.asarray(array)) == expected
    assert tensor_checksum(np.asfortranarray(array)) == expected
    assert tensor_checksum(np.repeat(array, 2, axis=0)[::2]) == expected


def test_streamed_checksum_is_the_same(rng):
    array = rng.standard_normal((9, 3)).astype(jnp.bfloat16)
    streamed = StreamedChecksum("bfloat16", (9, 3))
    for rows in np.array_split(array, 4):
        streamed.update(rows)
    assert streamed.hexdigest() == tensor_checksum(array)


def test_order_of_keys_does_not_matter_but_paths_do(rng):
    a, b = rng.standard_normal((2, 3, 4))
    assert fingerprint({"x": a, "y": {"z": b}}) == fingerprint({"y": {"z": b}, "x": a})
    assert fingerprint({"x": a, "y": {"z": b}}) != fingerprint({"x": b, "y": {"z": a}})
    assert fingerprint({"x": a, "y": {"z": b}}) != fingerprint({"x": a, "y": {"w": b}})
    assert fingerprint({"x": a}) != fingerprint({"x": a, "y": {"z": b}})


def test_linen_nnx_and_plain_trees_agree():
    linen = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    module.kernel[...], module.bias[...] = linen["kernel"], linen["bias"]
    plain = {name: np.asarray(value) for name, value in linen.items()}
    state = nnx.state(module)
    pure = nnx.to_pure_dict(state)
    assert len({fingerprint(tree) for tree in (linen, plain, state, pure)}) == 1
