"""The TPU kernels compile for TPUs that are not here, at the sizes of LLaMA."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxsparse.kernels import gradient_topk
from jaxsparse.kernels.gradient_topk.pallas_tpu import Tiling, best_of_tiles

from experiments.shapes import PROJECTIONS
from jaxsparse.common.errors import InputError
from jaxsparse.plan.absent import compile_for
from tests.engine.buffers import large_buffers

LLAMA = list({(p.inputs, p.outputs): p for p in PROJECTIONS if p.model.startswith("llama")}.values())
PRODUCT: set[tuple[int, ...]] = {(4096, 11008), (11008, 4096), (4096 * 11008,)}


def compiled(device: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    try:
        return compile_for(device, function, arguments).compiled
    except InputError as error:
        pytest.skip(str(error))


def activations(tokens: int, dtype: Any, *widths: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((tokens, width), dtype) for width in widths]


@pytest.mark.parametrize("device", ["v5e", "v5p"])
def test_gradient_topk_compiles(device: str) -> None:
    """All shapes at once; a batch that is no multiple of the block, and the second look, in float32."""
    shapes = [activations(3072, jnp.bfloat16, p.inputs, p.outputs) for p in LLAMA]
    shapes += [activations(3000, jnp.bfloat16, 4096, 1000), activations(3000, jnp.float32, 4096, 4096)]

    def every(arguments: list[list[jax.Array]]) -> list[Any]:
        found = []
        for (x, dy), count in zip(arguments, [16] * len(LLAMA) + [256, 2048], strict=True):
            tiles = jnp.arange(5, dtype=jnp.int32)
            found.append(best_of_tiles(x, dy, tiles, count, jnp.int32(0), cut=Tiling(), interpret=False))
        return found

    assert compiled(device, every, [shapes]).as_text().count("tpu_custom_call") >= len(shapes)


def test_gradient_topk_never_holds_the_product() -> None:
    executable = compiled("v5e", partial(gradient_topk, k=100), activations(3072, jnp.bfloat16, 4096, 11008))
    assert executable.as_text().count("tpu_custom_call") >= 2
    assert executable.memory_analysis().temp_size_in_bytes < 80e6  # the product would take 180 MB
    assert not large_buffers(executable, PRODUCT)


def test_the_search_finds_the_product() -> None:
    dense = lambda x, dy: jnp.argmax(jnp.abs(x.T @ dy))  # noqa: E731
    assert large_buffers(compiled("v5e", dense, activations(3072, jnp.bfloat16, 4096, 11008)), PRODUCT)
