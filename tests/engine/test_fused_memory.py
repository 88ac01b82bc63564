"""The compiled step of the fused engine holds no buffer as large as a target that the floor does not hold too.

The floor is forward and backward with no gradient of any target; steps are written into donated weights in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.data.batches import Batch
from jaxsparse.engine.tuner import ReferenceTuner
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.functional import LanguageModel
from tests.engine.buffers import large_buffers, shapes_of

# No two sizes are equal, so that a shape tells a weight.
CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=40, intermediate_size=72, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=14
)
TOKENS = 24
# Not by the emitters that compile faster, which the suite asks for.
AS_USERS_HAVE_IT = {"xla_cpu_use_fusion_emitters": True}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(CONFIG)


@pytest.fixture(scope="module")
def batch() -> Batch:
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, TOKENS + 1)).astype(np.int32)
    ones, places = np.ones((1, TOKENS), np.float32), np.arange(TOKENS, dtype=np.int32)[None]
    return Batch(ids[:, :-1], ids[:, 1:], ones, places, np.ones((1, TOKENS), np.int32))


@pytest.fixture(scope="module")
def floor(model: LanguageModel, batch: Batch) -> Any:
    def step(params: Any, scale: jax.Array) -> Any:
        layers = {**params["layers"], "input_layernorm": {"scale": scale}}
        return model.loss({**params, "layers": layers}, batch)[0]

    params = model.abstract()
    return (
        jax.jit(jax.grad(step, argnums=1))
        .lower(params, params["layers"]["input_layernorm"]["scale"])
        .compile(AS_USERS_HAVE_IT)
    )


METHODS: dict[str, Callable[[], Any]] = {
    "gasdu": lambda: js.gasdu(optax.adam(1e-3), density=0.005),
    "gasdu, dense": lambda: js.gasdu(optax.adam(1e-3), density=0.05),
    "neuroada": lambda: js.neuroada(optax.adam(1e-3), k=1),
    "neuroada, unmerged": lambda: js.neuroada(optax.adam(1e-3), k=1, unmerged=True),
    "paca": lambda: js.paca(optax.adam(1e-3), rank=3),
    "s2ft": lambda: js.s2ft(optax.adam(1e-3), output=0.25, down=0.05, head_size=CONFIG.head_dim),
    "cola": lambda: js.cola(optax.adam(1e-3), rank=3, chain_every=5),
    "spiel": lambda: js.spiel(1e-3, total_steps=100, density=0.005, budget=None),
    "spiel, MA": lambda: js.spiel(1e-3, total_steps=100, density=0.005, budget=None, grow="MA"),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_update_or_copy_of_a_target_exists(
    name: str, model: LanguageModel, batch: Batch, floor: Any
) -> None:
    params = model.abstract()
    shapes = shapes_of(params, ("self_attn", "mlp") if name == "s2ft" else ("self_attn",))
    tuner = js.fuse(model.loss, METHODS[name](), has_aux=True)
    compiled = tuner.step.lower(jax.eval_shape(tuner.init, params), batch).compile(AS_USERS_HAVE_IT)
    assert large_buffers(compiled, shapes) <= large_buffers(floor, shapes)


def test_the_search_finds_a_dense_gradient(model: LanguageModel, batch: Batch, floor: Any) -> None:
    """The reference engine has dense gradients, and the test would see them."""
    params = model.abstract()
    shapes = shapes_of(params, ("self_attn",))
    tuner = ReferenceTuner(model.loss, js.gasdu(optax.adam(1e-3), density=0.005))
    state = jax.eval_shape(lambda params: tuner.init(params), params)
    compiled = tuner.step.lower(state, batch).compile(AS_USERS_HAVE_IT)
    assert not large_buffers(compiled, shapes) <= large_buffers(floor, shapes)
