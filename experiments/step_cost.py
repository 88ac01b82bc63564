"""What a training step costs, method by method: all interleaved in one process, medians over rounds.

`floor` is the forward pass and the backward pass to the first layer with no gradient of any target: it differentiates
with respect to the scales of the layers' norms, which costs a sum over tokens each. No method that trains the first
layer can be faster.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from rich import filesize
from rich.table import Table

import jaxsparse as js
from experiments.baselines import Floor, FullAdamW
from experiments.layers import LINEAR_LAYERS
from experiments.tables import show
from experiments.timing import median_and_spread
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch
from jaxsparse.engine.tuner import ReferenceTuner
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel

DENSITIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class StepCostConfig:
    """Measures training steps of a model's shape with random weights and tokens.

    Example: python -m experiments.step_cost --model smollm2-135m --tokens 512 --json step_cost.json
    """

    model: str = "smollm2-135m"
    """A folder, a config.json, or a known name; no weights are read."""
    tokens: int = 512
    """Tokens of a row."""
    batch: int = 1
    """Rows of a batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping it."""
    rounds: int = 7
    """How often every step is timed."""
    together: bool = True
    """Hold the weights and states of all steps at once and time them in turns; else one step after the other."""
    only: tuple[str, ...] = ()
    """Names of cases to measure; all by default. The floor is always among them."""
    json: Path | None = None
    """Where to write the rows as JSON."""


@dataclass(frozen=True)
class Row:
    """One measured step.

    Attributes:
        name: the method, or `floor`.
        engine: "fused", "reference" or "".
        density: free coordinates / a target's size, where the method has one.
        step: "plain", or "refresh" where every step picks a support.
        median_s: median time of a step.
        spread_s: half the distance between the quartiles.
        peak_bytes: of the compiled step: arguments, outputs and temporaries, donated ones once.
        state_bytes: of the method's state.
    """

    name: str
    engine: str
    density: float | None
    step: str
    median_s: float
    spread_s: float
    peak_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Case:
    """A step to be timed.

    Attributes:
        name: as in `Row`.
        engine: as in `Row`.
        density: as in `Row`.
        step: as in `Row`.
        tuner: from nothing to what has `init(params)` and a jitted, donating `step(state, batch)`.
    """

    name: str
    engine: str
    density: float | None
    step: str
    tuner: Callable[[], Any]


def cases(model: LanguageModel, only: Sequence[str]) -> list[Case]:
    """Returns the steps to measure on a model."""

    def fused(method: Any) -> Callable[[], Any]:
        return lambda: js.fuse(model.loss, method, has_aux=True)

    def reference(method: Any) -> Callable[[], Any]:
        return lambda: ReferenceTuner(model.loss, method)

    adam = optax.adam(1e-4)
    found = [
        Case("floor", "", None, "plain", lambda: Floor(model.loss)),
        Case("full", "", None, "plain", lambda: FullAdamW(model.loss)),
        Case("lora", "fused", None, "plain", fused(js.lora(adam, rank=8))),
        Case("gasdu", "reference", 1e-4, "plain", reference(js.gasdu(adam, density=1e-4, refresh_every=10**6))),
    ]
    for density in DENSITIES:
        plain = js.gasdu(adam, density=density, refresh_every=10**6)
        found.append(Case("gasdu", "fused", density, "plain", fused(plain)))
    refresh = js.gasdu(adam, density=1e-4, refresh_every=1)
    found.append(Case("gasdu", "fused", 1e-4, "refresh", fused(refresh)))
    found += [
        Case(f"neuroada k={k}", "fused", None, "plain", fused(js.neuroada(adam, k=k, targets=LINEAR_LAYERS)))
        for k in (1, 20)
    ]
    s2ft = js.s2ft(adam, head_size=model.config.head_dim)
    found += [
        Case("s2ft", "fused", None, "plain", fused(s2ft)),
        Case("paca r=16", "fused", None, "plain", fused(js.paca(adam, rank=16))),
    ]
    return [case for case in found if not only or case.name == "floor" or case.name in only]


def batch(model: LanguageModel, rows: int, tokens: int) -> Batch:
    """Returns random tokens, all of which count."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, tokens + 1)).astype(np.int32)
    ones, places = np.ones((rows, tokens), np.float32), np.tile(np.arange(tokens, dtype=np.int32), (rows, 1))
    return jax.device_put(Batch(ids[:, :-1], ids[:, 1:], ones, places, np.ones((rows, tokens), np.int32)))


def measure(model: LanguageModel, found: Sequence[Case], data: Batch, rounds: int, dtype: str) -> list[Row]:
    """Compiles all steps, then times them in turns."""
    params = model.init(jax.random.key(0), dtype)
    steps, states, peaks, sizes = [], [], [], []
    with progress("compiling", len(found)) as advance:
        for case in found:
            tuner = case.tuner()
            state = tuner.init(params)
            if case is found[-1]:
                del params
            sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(getattr(state, "method", ()))))
            compiled = tuner.step.lower(state, data).compile()
            peaks.append(_peak_bytes(compiled))
            state, _ = compiled(state, data)  # picks the first support, and warms up
            steps.append(compiled)
            states.append(state)
            advance(1, case.name)
    times: list[list[float]] = [[] for _ in found]
    with progress("timing", rounds) as advance:
        for _ in range(rounds):
            for number, step in enumerate(steps):
                start = time.perf_counter()
                states[number], _ = jax.block_until_ready(step(states[number], data))
                times[number].append(time.perf_counter() - start)
            advance(1)
    return [
        Row(case.name, case.engine, case.density, case.step, *median_and_spread(seconds), peak, size)
        for case, seconds, peak, size in zip(found, times, peaks, sizes, strict=True)
    ]


def _peak_bytes(compiled: Any) -> int:
    memory = compiled.memory_analysis()
    both = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(both + memory.temp_size_in_bytes)


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the table, and writes the rows."""
    config = parse(lambda given: StepCostConfig, "python -m experiments.step_cost", arguments)
    model = LanguageModel(load_config(config.model), config.remat)
    found, data = cases(model, config.only), batch(model, config.batch, config.tokens)
    rows = []
    for group in [found] if config.together else [[case] for case in found]:
        rows += measure(model, group, data, config.rounds, config.dtype)
    show(_table(rows))
    if config.json is not None:
        atomic_write_text(config.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _table(rows: Sequence[Row]) -> Table:
    """Times, and their ratios to the floor and to full fine-tuning."""
    medians = {row.name: row.median_s for row in rows}
    table = Table("step", "engine", "density", "s", "/ floor", "/ full", "peak GB", "state")
    for row in rows:
        ratios = [f"{row.median_s / medians[other]:.2f}" if other in medians else "" for other in ("floor", "full")]
        density = "" if row.density is None else f"{row.density:g}"
        seconds = f"{row.median_s:.3f} ± {row.spread_s:.3f}"
        name = row.name if row.step == "plain" else f"{row.name}, {row.step}"
        table.add_row(
            name,
            row.engine,
            density,
            seconds,
            *ratios,
            f"{row.peak_bytes / 1e9:.2f}",
            filesize.decimal(row.state_bytes),
        )
    return table


if __name__ == "__main__":
    raise SystemExit(reported("experiments.step_cost", lambda: main(sys.argv[1:])))
