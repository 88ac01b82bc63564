"""The k largest by counting are those of `lax.top_k`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxsparse.kernels.threshold import by_threshold, largest

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]), st.floats(width=16, allow_subnormal=False)
)
SELECT = {select: jax.jit(select, static_argnums=1) for select in (by_threshold, largest)}


@settings(deadline=None, max_examples=60)
@given(
    scores=st.lists(NUMBERS, min_size=12, max_size=12),
    k=st.sampled_from([1, 5, 12]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@pytest.mark.parametrize("select", SELECT)
def test_picks_what_top_k_picks(select: object, scores: list[float], k: int, dtype: str) -> None:
    array = jnp.asarray(np.array(scores), dtype)
    array = jnp.where(jnp.isnan(array), jnp.nan, array + 0)  # one NaN, one zero: their signs order top_k's ties
    expected = sorted(np.asarray(jax.lax.top_k(array, k)[1]))
    assert sorted(np.asarray(SELECT[select](array, k))) == expected  # type: ignore[index]


def test_signs_of_zeros_and_nans_do_not_count() -> None:
    array = jnp.array([-1.0, -0.0, 0.0, -jnp.nan])
    assert sorted(np.asarray(by_threshold(array, 2))) == [1, 3]


def test_double_precision(rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        array = jnp.asarray(1 + 1e-12 * rng.normal(size=500))  # all alike in float32
        assert sorted(np.asarray(by_threshold(array, 50))) == sorted(np.argsort(-np.asarray(array))[:50])
