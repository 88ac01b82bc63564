"""Running Pallas kernels: the one place that knows which compiler takes them, and which implementation an op takes."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.sharding import ManualAxisType

# JAX says so since 0.11, when it lowers. Mosaic GPU, which it names instead, has no cumsum, argmax or gather and no
# refs indexed by arrays, which these kernels need: they stay with Triton until it has. Every op has an XLA route too.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

__all__ = ["Implementation", "alike", "mosaic_call", "run", "triton_call"]

Implementation = str | None
""""xla": plain XLA; "pallas": a Pallas kernel; None: whichever is best where the program runs."""


def run(
    implementation: Implementation,
    arguments: Sequence[jax.Array],
    *,
    xla: Callable[..., Any],
    gpu: Callable[..., Any] | None = None,
    tpu: Callable[..., Any] | None = None,
    reason: str | None = None,
) -> Any:
    """Calls the implementation of an op that was asked for, or the one that is best where the program runs.

    A GPU older than Ampere, such as Colab's T4, for which Triton compiles nothing, takes plain XLA.

    Derivatives are those of plain XLA. What the kernels take beside arrays is bound by `partial`, but for `interpret`,
    which is set where neither a GPU nor a TPU is: "pallas" works everywhere, slowly.

    Args:
        implementation: what was asked for.
        arguments: arrays.
        xla: plain XLA.
        gpu: a kernel for NVIDIA GPUs.
        tpu: a kernel for TPUs.
        reason: why no kernel can take these arguments, if none can.

    Returns:
        What they return.

    Raises:
        ValueError: the implementation is unknown, or there is no kernel for these arguments.
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be None, 'xla' or 'pallas', got {implementation!r}")
    if implementation == "pallas" and reason:
        raise ValueError(f"implementation='pallas' cannot take this: {reason}; try implementation='xla'")
    if implementation == "xla" or reason:
        return xla(*arguments)
    routes = {}
    if gpu is not None and not _is_older_gpu():
        routes["cuda"] = _with_slopes_of(xla, _traced_once(gpu, interpret=False))
    if tpu is not None:
        routes["tpu"] = _with_slopes_of(xla, _traced_once(tpu, interpret=False))
    default = xla
    if implementation == "pallas":
        assert gpu is not None
        default = _with_slopes_of(xla, _traced_once(gpu, interpret=True))
    return jax.lax.platform_dependent(*arguments, **routes, default=default)


@cache
def _is_older_gpu() -> bool:
    """Whether the GPU of this process is one that Triton refuses."""
    capabilities = [getattr(device, "compute_capability", None) for device in jax.local_devices()]
    return any(float(capability) < 8 for capability in capabilities if capability is not None)


def _traced_once(kernel: Callable[..., Any], interpret: bool) -> Callable[..., Any]:
    """The kernel, traced once for arguments alike: JAX traces the routes of all devices wherever a program runs."""
    options = {**getattr(kernel, "keywords", {}), "interpret": interpret}
    return partial(_jitted(getattr(kernel, "func", kernel), tuple(options)), **options)


def _with_slopes_of(xla: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, differentiated as plain XLA is: Pallas itself cannot be."""

    @jax.custom_jvp
    def call(*arrays: jax.Array) -> Any:
        return kernel(*arrays)

    call.defjvp(lambda primals, tangents: jax.jvp(xla, primals, tangents))
    return call


@cache
def _jitted(kernel: Callable[..., Any], options: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(kernel, static_argnames=options)


def triton_call(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    *,
    name: str,
    grid: tuple[int, ...],
    results: Sequence[tuple[tuple[int, ...], Any]],
    interpret: bool,
    warps: int = 4,
    stages: int = 2,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Runs a kernel on a GPU, compiled by Triton.

    Args:
        kernel: of refs, each a whole array, those of the results last.
        arrays: arguments.
        name: the kernel's, in profiles.
        grid: numbers of programs.
        results: shapes and dtypes.
        interpret: run it as plain JAX, on any device.
        warps: of a program.
        stages: how deeply loops over memory are pipelined.
        aliases: results that take an argument's memory, {number of the argument: number of the result}.
    """
    arrays, axes = alike(arrays)
    kind = ManualAxisType(varying=axes)
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype in results],
        interpret=interpret,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )
    return list(call(*arrays))


def mosaic_call(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    *,
    name: str,
    grid: tuple[int, ...],
    blocks: Sequence[pl.BlockSpec],
    results: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: Sequence[Any],
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel on a TPU, compiled by Mosaic.

    Args:
        kernel: of refs: the numbers, a block of every other array and result, and the scratch buffers.
        arrays: arguments; those before the ones that have blocks are numbers, which blocks may depend on.
        name: the kernel's, in profiles.
        grid: numbers of programs; along the last axis, they share the scratch buffers.
        blocks: of the last arguments.
        results: shapes, dtypes and blocks.
        scratch: buffers on chip.
        interpret: run it as plain JAX, on any device.
    """
    arrays, axes = alike(arrays)
    kind = ManualAxisType(varying=axes)
    call = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(arrays) - len(blocks),
            grid=grid,
            in_specs=blocks,
            out_specs=[block for _, _, block in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind) for shape, dtype, _ in results],
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=(*["parallel"] * (len(grid) - 1), "arbitrary")),
    )
    return list(call(*arrays))


def alike(arrays: Sequence[jax.Array]) -> tuple[list[jax.Array], frozenset[str]]:
    """Inside `shard_map`: the arrays, each made to vary over all mesh axes over which any does, and those axes."""
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset[str]().union(*varying)
    pairs = zip(arrays, varying, strict=True)
    return [jax.lax.pcast(a, tuple(sorted(axes - own)), to="varying") if axes - own else a for a, own in pairs], axes
