"""Peak memory of a training step on an accelerator that need not be here: every step is compiled for it."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

import jaxsparse as js
from experiments.baselines import Floor, FullAdamW
from experiments.tables import show
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.plan.absent import Plan, compile_for, use_cpu


@dataclass(frozen=True)
class MemoryConfig:
    """Compiles training steps for a device that is not here, and prints the memory that they need at their peak.

    Example: python -m experiments.memory --model llama2-7b --device h100 --json memory.json
    """

    model: str = "llama2-7b"
    """A known name, a folder, or a config.json; no weights are read."""
    device: Literal["h100"] = "h100"
    """The device to compile for."""
    batch: int = 4
    """Rows of a batch (GASDU's paper: 4)."""
    length: int = 768
    """Tokens of a row (GASDU's paper: 768)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again instead of keeping it."""
    budget: float = 1e-4
    """GASDU's free coordinates / all parameters, shared equally over the targets."""
    only: tuple[str, ...] = ()
    """Names of steps to compile; all by default."""
    json: Path | None = None
    """Where to write the rows as JSON."""


@dataclass(frozen=True)
class Row:
    """One compiled step.

    Attributes:
        name: the method, or `floor`.
        step: "plain", or "refresh" where it picks a support.
        peak_bytes: the most memory in use at a time: weights, state, activations and temporaries.
        argument_bytes: of these the weights, the state and the batch.
    """

    name: str
    step: str
    peak_bytes: int
    argument_bytes: int


def steps(model: LanguageModel, budget: float) -> dict[str, Callable[[], Any]]:
    """Returns what makes each step: from nothing to what has `init(params)` and `step(state, batch)`."""

    def fused(method: Any) -> Callable[[], Any]:
        return lambda: js.fuse(model.loss, method, has_aux=True)

    adam = optax.adam(1e-4)
    seven = [js.Target(rf"layers/{part}/.*_proj/kernel", stack_axes=(0,)) for part in ("self_attn", "mlp")]
    return {
        "floor": lambda: Floor(model.loss),
        "full": lambda: FullAdamW(model.loss),
        "lora": fused(js.lora(adam, rank=8)),
        "gasdu": fused(js.gasdu(adam, budget=budget, share="even", refresh_every=50)),
        "neuroada": fused(js.neuroada(adam, k=1, targets=seven)),
        "s2ft": fused(js.s2ft(adam, head_size=model.config.head_dim)),
    }


def measure(config: MemoryConfig) -> list[Row]:
    """Compiles the steps; GASDU's one step serves those that pick a support and those that do not."""
    model = LanguageModel(load_config(config.model), config.remat)
    params, shape = model.abstract(jnp.dtype(config.dtype)), (config.batch, config.length)
    whole, number = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(whole, whole, number, whole, whole)
    made = {name: make for name, make in steps(model, config.budget).items() if not config.only or name in config.only}

    def plan(make: Callable[[], Any]) -> Plan:
        tuner = make()
        state = jax.eval_shape(tuner.init, params)
        return compile_for(config.device, tuner.step.__wrapped__, (state, batch), donate=(0,))

    # Two at a time: parts of XLA's compiler use one core only.
    with ThreadPoolExecutor(2) as pool, progress(f"compiling for {config.device}", len(made)) as advance:
        plans = {name: pool.submit(plan, make) for name, make in made.items()}
        names = {future: name for name, future in plans.items()}
        for future in as_completed(names):
            future.result()
            advance(1, names[future])
    return [
        Row(name, step, plans[name].result().peak_bytes, plans[name].result().argument_bytes)
        for name in made
        for step in (("plain", "refresh") if name == "gasdu" else ("plain",))
    ]


def main(arguments: Sequence[str]) -> int:
    """Compiles, prints the table, and writes the rows."""
    use_cpu()
    config = parse(lambda given: MemoryConfig, "python -m experiments.memory", arguments)
    rows = measure(config)
    show(_table(rows))
    if config.json is not None:
        atomic_write_text(config.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _table(rows: Sequence[Row]) -> Table:
    full = next((row.peak_bytes for row in rows if row.name == "full"), None)
    table = Table("step", "", "peak GB", "of it arguments", "/ full")
    for row in rows:
        ratio = f"{row.peak_bytes / full:.3f}" if full else ""
        table.add_row(row.name, row.step, f"{row.peak_bytes / 1e9:.2f}", f"{row.argument_bytes / 1e9:.2f}", ratio)
    return table


if __name__ == "__main__":
    raise SystemExit(reported("experiments.memory", lambda: main(sys.argv[1:])))
