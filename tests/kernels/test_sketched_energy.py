"""Sketches of a product's energy: right in the mean, within their deviation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import sketched_energy


def test_the_mean_over_signs_is_the_energy(rng: np.random.Generator) -> None:
    x, dy = (jnp.asarray(rng.normal(size=(6, width)), jnp.float32) for width in (7, 9))
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 4000)
    estimates = np.asarray(jax.vmap(lambda key: sketched_energy(x, dy, key, samples=4))(keys))
    exact = float(jnp.sum(jnp.square(x.T @ dy)))
    assert estimates.std() <= 0.75 * exact  # sqrt(2 / 4) for rank 1
    assert abs(estimates.mean() - exact) < 6 * estimates.std() / np.sqrt(len(estimates))


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        sketched_energy(jnp.ones((2, 3)), jnp.ones((2, 3)), jax.random.key(0), samples=0)
