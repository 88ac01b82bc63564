"""What the ops of kernels/ cost on the shapes of models, and what the dense routes that they replace cost.

Flops and bytes are counted (experiments/ops.py says how). The roofline time is the longer of computing and moving on an
H100: what no kernel can beat. Registers and shared memory are those of the op's kernels, compiled for an H100 that
need not be here. Times are of the device that is here: the op, its plain XLA version and the dense route in turns.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich import filesize
from rich.table import Table

from experiments.ops import OPS, Case, Cost
from experiments.shapes import PROJECTIONS, Projection
from experiments.tables import show
from experiments.timing import in_turns
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.progress import progress
from jaxsparse.plan.absent import DEVICES, Gpu, use_cpu
from jaxsparse.plan.resources import gpu_kernels

# NVIDIA H100 SXM5, flops per second: tensor cores for bf16; float32 without them, since TF32 rounds to 10 bits.
PEAK = {"bfloat16": 989e12, "float32": 67e12}


@dataclass(frozen=True)
class KernelsConfig:
    """Counts, compiles and (with --rounds) times the ops of kernels/.

    Example: python -m experiments.kernels --ops gradient_topk --models smollm2-135m --dtype float32 --rounds 9
    """

    ops: tuple[str, ...] = ()
    """Names of ops; all by default."""
    models: tuple[str, ...] = ()
    """Names of models, whose projections are the shapes; by default LLaMA-2-7B, LLaMA-3-8B, SmolLM2-135M and GPT-2."""
    projections: tuple[str, ...] = ()
    """Names of projections, such as self_attn/q_proj; all by default."""
    density: float = 1e-4
    """Entries that an op deals with / all entries."""
    dtype: str = "bfloat16"
    """Dtype of the arrays: bfloat16 or float32."""
    compile: bool = True
    """Compile the kernels for an H100, which needs JAX's CUDA plugin and JAX_PLATFORMS=cpu."""
    rounds: int = 0
    """How often the routes are timed, interleaved; 0: not at all."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where they are timed. On a GPU nothing is compiled for an absent one."""
    json: Path | None = None
    """Where to write the rows as JSON."""


@dataclass(frozen=True)
class Row:
    """An op on a shape.

    Attributes:
        op: its name.
        shape: model and projection.
        cost: of the op.
        dense_cost: of the dense route.
        roofline_s: the least time of the op on an H100.
        dense_roofline_s: the least time of the dense route.
        kernels: what its kernels take, as `GpuKernel`s; None: not compiled.
        op_s: median time on this machine, and half the distance between the quartiles; None: not measured.
        xla_s: the same of the op's plain XLA version, which on a CPU is the op.
        dense_s: the same of the dense route.
    """

    op: str
    shape: str
    cost: Cost
    dense_cost: Cost
    roofline_s: float
    dense_roofline_s: float
    kernels: list[Any] | None = None
    op_s: tuple[float, float] | None = None
    xla_s: tuple[float, float] | None = None
    dense_s: tuple[float, float] | None = None


def roofline(cost: Cost, dtype: str) -> float:
    """Returns the seconds that an H100 takes at the least."""
    gpu = DEVICES["h100"]
    assert isinstance(gpu, Gpu)
    return max(cost.flops / PEAK[dtype], cost.bytes / gpu.bandwidth)


def times(case: Case, rounds: int, calls: int, seed: int = 0) -> list[tuple[float, float]]:
    """Returns median and spread of the op, of its plain XLA version and of the dense route, timed in turns.

    Args:
        case: the op.
        rounds: how often.
        calls: one after the other and timed together: on a GPU, starting one call hides behind running another.
        seed: of the arguments.
    """
    rng = np.random.default_rng(seed)
    arguments = [jnp.asarray(argument.draw(rng)) for argument in case.arguments]
    functions = (case.sparse, partial(case.sparse, implementation="xla"), case.dense)
    routes = [jax.jit(route).lower(*arguments).compile() for route in functions]
    calling = {str(number): partial(route, *arguments) for number, route in enumerate(routes)}
    return list(in_turns(calling, rounds, calls=calls).values())


def measure(config: KernelsConfig) -> list[Row]:
    """Counts, compiles and times what the configuration names."""
    shapes = [
        shape
        for shape in PROJECTIONS
        if (not config.models or shape.model in config.models)
        and (not config.projections or shape.name in config.projections)
    ]
    unknown = set(config.ops) - set(OPS)
    if unknown or not shapes or config.dtype not in PEAK:
        models = ", ".join(dict.fromkeys(shape.model for shape in PROJECTIONS))
        raise InputError(
            f"nothing to measure: ops are {', '.join(OPS)}; models are {models}; dtypes are {', '.join(PEAK)}"
        )
    todo = [(op, shape) for op in config.ops or OPS for shape in shapes]
    rows = []
    with progress("measuring", len(todo)) as advance:
        for op, shape in todo:
            rows.append(_row(op, shape, config))
            advance(1, f"{op} {shape}")
    return rows


def _row(op: str, shape: Projection, config: KernelsConfig) -> Row:
    case = OPS[op](shape, config.density, config.dtype)
    row = Row(
        op, str(shape), case.cost, case.dense_cost,
        roofline(case.cost, config.dtype), roofline(case.dense_cost, config.dtype),
    )  # fmt: skip
    if config.compile and config.device == "cpu" and case.kernels:
        found = [gpu_kernels("h100", kernel.function, kernel.arguments)[1] for kernel in case.kernels]
        row = dataclasses.replace(row, kernels=[kernel for each in found for kernel in each])
    if config.rounds:
        own, xla, dense = times(case, config.rounds, calls=1 if config.device == "cpu" else 8)
        row = dataclasses.replace(row, op_s=own, xla_s=xla, dense_s=dense)
    return row


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, and writes the rows."""
    config = parse(lambda given: KernelsConfig, "python -m experiments.kernels", arguments)
    if config.device == "cpu":
        use_cpu()
    rows = measure(config)
    show(_table(rows))
    if config.json is not None:
        atomic_write_text(config.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _table(rows: Sequence[Row]) -> Table:
    """Every cell of costs: the op, and the dense route."""
    names = ("op", "shape", "Gflop", "bytes", "moved / dense", "H100 µs", "registers", "shared", "ms", "XLA", "dense")
    table = Table(*names)
    for row in rows:
        both = (row.cost, row.dense_cost)
        kernels = row.kernels or []
        table.add_row(
            row.op,
            row.shape,
            " | ".join(f"{cost.flops / 1e9:.4g}" for cost in both),
            " | ".join(filesize.decimal(cost.bytes) for cost in both),
            f"{row.cost.moved_bytes / row.dense_cost.moved_bytes:.2%}",
            " | ".join(f"{seconds * 1e6:.3g}" for seconds in (row.roofline_s, row.dense_roofline_s)),
            ", ".join(str(kernel.registers) for kernel in kernels),
            ", ".join(filesize.decimal(kernel.shared_bytes) for kernel in kernels),
            *(f"{1e3 * t[0]:.3g} ± {1e3 * t[1]:.1g}" if t else "" for t in (row.op_s, row.xla_s, row.dense_s)),
        )
    return table


if __name__ == "__main__":
    raise SystemExit(reported("experiments.kernels", lambda: main(sys.argv[1:])))
