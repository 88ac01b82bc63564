"""Beyond LoRA, tables 14 and 15: throughput and memory of a step, by method and adapted layers."""

from pathlib import Path
from typing import Any

import numpy as np
import optax

import jaxsparse as js
from experiments.layers import LINEAR_LAYERS
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels, shared_legend
from experiments.step_cost import Case, Row, batch, measure
from jaxsparse.methods.registry import constructor_of
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.subspaces.targets import Targets

__all__ = ["EXPERIMENT"]

_LAYERS: dict[str, Targets] = {
    "all linear layers": LINEAR_LAYERS,
    "query and value": js.Target(r"layers/self_attn/(q|v)_proj/kernel", stack_axes=(0,)),
}
_CHAINED = ("cola", "rac_lora", "c3la", "r_c3la", "c_paca")
_NEVER = 10**6
"""Steps of a chain that does not end while steps are timed: one in hundreds starts a chain."""


def run(bench: Bench) -> None:
    """Times all steps in turns, in one process: random weights of the model's shape, random tokens."""
    settings = bench.settings
    model = LanguageModel(load_config(settings.model))
    cases = []
    for layers, targets in _LAYERS.items():
        # Full fine-tuning has no layers to choose: its step is one and the same, and stands in both tables.
        labels = [label for label in bench.labels if label != "full" or not cases]
        cases += [
            Case(f"{label}: {layers}", "fused", None, "plain", _tuner(bench, model, label, targets)) for label in labels
        ]
    data = batch(model, settings.batch[0], settings.max_length)
    rows = {row.name: row for row in measure(model, cases, data, settings.more["rounds"], settings.dtype)}
    tables = {layers: _table(bench, rows, layers) for layers in _LAYERS}
    for layers, table in tables.items():
        name = layers.replace(" ", "_")
        bench.report.table(name, table, f"Training steps with {layers} adapted, interleaved in one process")
        _findings(bench, {line["method"]: line for line in table}, layers)
    _draw(bench, tables)
    bench.report.printed(
        EXPERIMENT.folder / "paper.csv", "table 15, query and value, r = 16, an H100; table 14 is a picture"
    )


def _tuner(bench: Bench, model: LanguageModel, label: str, targets: Targets) -> Any:
    told = dict(bench.settings.methods[label])
    method = told.pop("method", label)
    options = {name: value for name, value in told.items() if name in ("rank", "alpha")}
    if method in _CHAINED:
        options["chain_every"] = _NEVER
    if method != "full":
        options["targets"] = targets
    return lambda: js.fuse(model.loss, constructor_of(method)(optax.adam(1e-4), **options), has_aux=True)


def _table(bench: Bench, rows: dict[str, Row], layers: str) -> list[dict[str, Any]]:
    tokens = bench.settings.batch[0] * bench.settings.max_length
    table = []
    own = {label: rows.get(f"{label}: {layers}") for label in bench.labels}
    own["full"] = rows.get(f"full: {next(iter(_LAYERS))}")
    lora = own.get("lora")
    for label in bench.labels:
        row = own[label]
        if row is not None:
            table.append(
                {
                    "method": label,
                    "tokens/s": tokens / row.median_s,
                    "ms a step": 1e3 * row.median_s,
                    "spread, ms": 1e3 * row.spread_s,
                    "throughput / LoRA's": lora.median_s / row.median_s if lora else None,
                    "peak memory, MB": row.peak_bytes / 1e6,
                    "memory / LoRA's": row.peak_bytes / lora.peak_bytes if lora else None,
                    "state, MB": row.state_bytes / 1e6,
                }
            )
    return table


def _findings(bench: Bench, found: dict[str, dict[str, Any]], layers: str) -> None:
    if "lora" not in found:
        return
    for label in ("paca", "r_cla"):
        if label in found:
            faster, memory = found[label]["throughput / LoRA's"] - 1, 1 - found[label]["memory / LoRA's"]
            # A difference below both spreads is none.
            noise = (found[label]["spread, ms"] + found["lora"]["spread, ms"]) / found["lora"]["ms a step"]
            said = f"{faster:+.1%} throughput (spread {noise:.1%}), {memory:+.1%} less peak memory"
            claim = f"{label} is faster than LoRA and takes less memory, {layers}"
            bench.report.finding(claim, faster > noise and memory > 0, said)
    if "full" in found and "paca" in found:
        ratio = found["full"]["ms a step"] / found["paca"]["ms a step"]
        claim = (
            "full fine-tuning is the fastest" if layers.startswith("all") else "paca is faster than full fine-tuning"
        )
        seen = ratio < 1 if layers.startswith("all") else ratio > 1
        bench.report.finding(f"{claim}, {layers}", seen, f"full takes {ratio:.2f} of paca's time")


def _draw(bench: Bench, tables: dict[str, list[dict[str, Any]]]) -> None:
    figure, drawn = panels(2, title="A training step by method and adapted layers", size=(6.5, 4.4))
    data = [{"layers": layers} | line for layers, table in tables.items() for line in table]
    for panel, value, name in zip(drawn[0], ("ms a step", "peak memory, MB"), ("ms", "MB"), strict=True):
        for at, (layers, table) in enumerate(tables.items()):
            places = np.arange(len(table)) + 0.4 * at
            spread = [line["spread, ms"] for line in table] if value == "ms a step" else None
            panel.bar(places, [line[value] for line in table], 0.38, yerr=spread, capsize=2, label=layers)
        panel.set_xticks(np.arange(len(bench.labels)) + 0.2, bench.labels, rotation=45)
        panel.set(title=value, xlabel="method", ylabel=name)
    shared_legend(figure, drawn[0, 0])
    bench.report.picture(
        "steps", figure, data, "Time (median; whiskers: half the distance between quartiles) and memory"
    )


EXPERIMENT = Experiment(
    name="beyond_lora/cost",
    shows="Beyond LoRA, tables 14 and 15",
    question="What do steps of the sparse variants cost beside LoRA's and full fine-tuning's?",
    run=run,
    folder=Path(__file__).parent,
)
