"""Every GPU kernel compiles for an H100 that is not here, at the sizes of LLaMA: nothing spills, all of it fits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxsparse.kernels import gradient_topk, scatter_add_unique, scatter_unique

from experiments.ops import OPS
from experiments.shapes import PROJECTIONS, Projection
from jaxsparse.common.errors import InputError
from jaxsparse.plan.absent import DEVICES, compile_for
from jaxsparse.plan.resources import gpu_kernels
from tests.engine.buffers import large_buffers

# One of each shape: both models have some.
LLAMA: list[Projection] = list({(p.inputs, p.outputs): p for p in PROJECTIONS if p.model.startswith("llama")}.values())
# The suite has compilers work less hard.
OPTIONS = {"xla_backend_optimization_level": 3}
PRODUCT: set[tuple[int, ...]] = {(4096, 11008), (11008, 4096), (4096 * 11008,)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("op", [op for op, case in OPS.items() if case(LLAMA[0], 1e-4, "bfloat16").kernels])
def test_kernels_compile_without_spills_and_fit(op: str, dtype: str) -> None:
    shapes = LLAMA[:1] if dtype == "float32" else LLAMA
    bare = [each for shape in shapes for each in OPS[op](shape, 1e-4, dtype).kernels]

    def every(arguments: list[Any]) -> list[Any]:
        return [each.function(*own) for each, own in zip(bare, arguments, strict=True)]

    try:
        _, kernels = gpu_kernels("h100", every, [[each.arguments for each in bare]], options=OPTIONS)
    except InputError as error:
        pytest.skip(str(error))
    assert len(kernels) == len(bare)
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, kernel
        assert kernel.shared_bytes <= DEVICES["h100"].shared_memory_of_block, kernel
        assert kernel.registers * kernel.threads <= 2**16, kernel


def compiled(function: Callable[..., Any], *widths: int) -> Any:
    try:
        arguments = [jax.ShapeDtypeStruct((3072, width), jnp.bfloat16) for width in widths]
        return compile_for("h100", function, arguments, options=OPTIONS).compiled
    except InputError as error:
        pytest.skip(str(error))


def test_gradient_topk_never_holds_the_product() -> None:
    executable = compiled(partial(gradient_topk, k=900), 4096, 11008)
    assert executable.as_text().count("gpu.triton") >= 2
    # The product would take 180 MB. Where the second pass is not enough, XLA takes it a band at a time.
    assert executable.memory_analysis().temp_size_in_bytes < 80e6
    assert not large_buffers(executable, PRODUCT)


@pytest.mark.parametrize("scatter", [scatter_add_unique, scatter_unique])
def test_entries_are_scattered_in_place(scatter: Callable[..., Any]) -> None:
    w, index = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((1677,), jnp.int32)
    values = jax.ShapeDtypeStruct((1677,), jnp.float32)
    try:
        plan = compile_for("h100", scatter, [w, index, values], donate=(0,), options=OPTIONS)
    except InputError as error:
        pytest.skip(str(error))
    memory = plan.compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 4096 * 4096
    assert memory.temp_size_in_bytes < 4 * 4 * 1677


def test_the_search_finds_the_product() -> None:
    assert large_buffers(compiled(lambda x, dy: jnp.argmax(jnp.abs(x.T @ dy)), 4096, 11008), PRODUCT)
