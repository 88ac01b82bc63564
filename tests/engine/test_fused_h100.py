"""On an H100, compiled for without one: the fused step holds no buffer of a target's size beyond the floor's.

The layers have LLaMA-2-7B's shapes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxsparse as js
from jaxsparse.common.errors import InputError
from jaxsparse.data.batches import Batch
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.functional import LanguageModel
from jaxsparse.plan.absent import compile_for
from tests.engine.buffers import large_buffers, shapes_of

MODEL = LanguageModel(
    LlamaConfig(
        vocab_size=320,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=2,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    ),
    "full",
)
PARAMS = MODEL.abstract(jnp.bfloat16)
WHOLE, NUMBER = (jax.ShapeDtypeStruct((2, 768), dtype) for dtype in (jnp.int32, jnp.float32))
BATCH = Batch(WHOLE, WHOLE, NUMBER, WHOLE, WHOLE)
SHAPES = shapes_of(PARAMS, ("self_attn", "mlp"))


def compiled(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    try:
        # The suite has compilers work less hard, which takes them longer here.
        options = {"xla_backend_optimization_level": 3}
        return compile_for("h100", function, arguments, donate=donate, options=options).compiled
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def floor() -> set[Any]:
    def loss(scale: jax.Array, params: Any, batch: Any) -> Any:
        layers = {**params["layers"], "input_layernorm": {"scale": scale}}
        return MODEL.loss({**params, "layers": layers}, batch)[0]

    scale = PARAMS["layers"]["input_layernorm"]["scale"]
    return large_buffers(compiled(jax.grad(loss), scale, PARAMS, BATCH), SHAPES)


METHODS: dict[str, Callable[[], Any]] = {
    "gasdu": lambda: js.gasdu(optax.adam(1e-3), budget=1e-4, share="even"),
    "neuroada": lambda: js.neuroada(optax.adam(1e-3), k=1),
    "s2ft": lambda: js.s2ft(optax.adam(1e-3), head_size=128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_update_or_copy_of_a_target_exists(name: str, floor: set[Any]) -> None:
    tuner = js.fuse(MODEL.loss, METHODS[name](), has_aux=True)
    state = jax.eval_shape(tuner.init, PARAMS)
    found = large_buffers(compiled(tuner.step.__wrapped__, state, BATCH, donate=(0,)), SHAPES)
    assert found <= floor, found - floor


def test_the_search_finds_a_dense_gradient(floor: set[Any]) -> None:
    kernel = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    gradient = jax.grad(lambda kernel, x: jnp.sum(jnp.sin(x @ kernel)))
    assert not large_buffers(compiled(gradient, kernel, kernel), SHAPES) <= floor
