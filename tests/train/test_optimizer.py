"""The method of a run is built around the run's optimizer."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.methods.registry import options_class
from jaxsparse.train.config import DataConfig, FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxsparse.train.optimizer import learning_rate, make_method

STEPS = 6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gasdu", {"density": 0.5, "refresh_every": "adaptive:1:2:2"}),
        ("c3la", {"rank": 1, "chain_every": 2}),
        ("c3la", {"rank": 1, "chains": 3}),  # the run knows total_steps
        ("lisa", {"layers": 1, "every": 2}),
    ],
)
def test_the_rate_falls_over_the_whole_run_whatever_restarts(method: str, options: dict) -> None:
    inner = OptimizerConfig(optimizer="sgd", lr=0.5, schedule="linear", warmup_steps=1, clip=0.0)
    config = FinetuneConfig(
        base=ModelConfig("none"),
        rows=DataConfig(Path("none.json")),
        run=RunConfig(Path("none")),
        chosen_method=options_class(method)(**options),
        inner=inner,
        method=method,
        targets=".*/kernel",
    )
    params = {"layers": {"kernel": jnp.ones((3, 4, 2))}}
    tx = make_method(config, params, STEPS)
    state, sizes = tx.init(params), []
    for _ in range(STEPS):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        sizes.append(float(-jnp.min(updates["layers"]["kernel"])))
    rate = learning_rate(inner, STEPS)
    expected = np.array([float(rate(step)) for step in range(STEPS)])
    assert expected[0] == 0
    np.testing.assert_allclose(np.array(sizes) / sizes[1], expected / expected[1], rtol=1e-6)
