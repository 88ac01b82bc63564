"""S²FT, figure 5: time and memory of a training step, by rows and their length."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import jaxsparse as js
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels, shared_legend
from experiments.runner.training import config_of
from experiments.step_cost import Case, Row, batch, measure
from jaxsparse.engine.description import count_slots
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.optimizer import make_method

__all__ = ["EXPERIMENT"]

Shape = tuple[int, int]


def run(bench: Bench) -> None:
    """Times the steps of all methods in turns, in one process: random weights of the model's shape, random tokens."""
    settings = bench.settings
    model = LanguageModel(load_config(settings.model))
    params = model.abstract(jnp.dtype(settings.dtype))
    methods = {label: _method(bench, label, params, model.config.head_dim) for label in bench.labels}
    cases = [Case(label, "fused", None, "plain", _fused(model, method)) for label, method in methods.items()]
    found: dict[tuple[str, Shape], Row] = {}
    for rows, tokens in settings.more["shapes"]:
        measured = measure(model, cases, batch(model, rows, tokens), settings.more["rounds"], settings.dtype)
        found |= {(row.name, (rows, tokens)): row for row in measured}
    entries = {label: count_slots(method, params) for label, method in methods.items()}
    table = [_line(row, shape, entries) for (_, shape), row in found.items()]
    bench.report.table("steps", table, "Training steps, interleaved in one process; memory of the compiled step")
    _picture(bench, table)
    for other in ("full", "lora", "dora"):
        _finding(bench, found, other)
    bench.report.text(
        "The paper (LLaMA-2-7B and 13B on an A100) prints of figure 5: against full fine-tuning 1.4 to 3.0 times less "
        "memory and 1.5 to 2.7 times the speed; against LoRA about 10 % less of both."
    )


def _method(bench: Bench, label: str, params: Any, head_size: int) -> Any:
    """A method as a run of `jaxsparse finetune` would make it."""
    return make_method(config_of(bench.trial(label, "-"), bench.folder, bench.data_root), params, 1000, head_size)


def _fused(model: LanguageModel, method: Any) -> Any:
    return lambda: js.fuse(model.loss, method, has_aux=True)


def _line(row: Row, shape: Shape, entries: Mapping[str, int]) -> dict[str, Any]:
    return {
        "method": row.name,
        "rows x tokens": f"{shape[0]} x {shape[1]}",
        "entries trained": entries[row.name],
        "ms a step": 1e3 * row.median_s,
        "spread, ms": 1e3 * row.spread_s,
        "peak memory, MB": row.peak_bytes / 1e6,
        "state, MB": row.state_bytes / 1e6,
    }


def _picture(bench: Bench, table: list[dict[str, Any]]) -> None:
    figure, drawn = panels(2, title="Cost of a training step by rows and tokens of a batch")
    for panel, value, spread in ((drawn[0, 0], "ms a step", "spread, ms"), (drawn[0, 1], "peak memory, MB", None)):
        for place, label in enumerate(bench.labels):
            own = [line for line in table if line["method"] == label]
            width = 0.8 / len(bench.labels)
            panel.bar(
                [at + width * place for at in range(len(own))],
                [line[value] for line in own],
                width,
                yerr=None if spread is None else [line[spread] for line in own],
                capsize=2,
                label=label,
            )
        shapes = list(dict.fromkeys(line["rows x tokens"] for line in table))
        panel.set_xticks([at + 0.4 - 0.4 / len(bench.labels) for at in range(len(shapes))], shapes)
        panel.set(xlabel="rows x tokens of a batch", ylabel=value, title=value)
    shared_legend(figure, drawn[0, 0])
    caption = "Time and memory of steps; whiskers: half the distance between quartiles"
    bench.report.picture("steps_picture", figure, table, caption)


def _finding(bench: Bench, found: Mapping[tuple[str, Shape], Row], other: str) -> None:
    """Whether S²FT takes less time and less memory than another method, at all shapes."""
    pairs = [
        (found["s2ft", shape], row)
        for (name, shape), row in found.items()
        if name == other and ("s2ft", shape) in found
    ]
    if not pairs:
        return
    speed = [theirs.median_s / ours.median_s for ours, theirs in pairs]
    memory = [theirs.peak_bytes / ours.peak_bytes for ours, theirs in pairs]
    clear = sum(ours.median_s + ours.spread_s < theirs.median_s - theirs.spread_s for ours, theirs in pairs)
    named = "full fine-tuning" if other == "full" else other
    said = (
        f"{named} takes {min(speed):.2f} to {max(speed):.2f} times its time, median {statistics.median(speed):.2f}; "
        f"beyond the spread at {clear} of {len(pairs)} shapes"
    )
    bench.report.finding(f"S²FT's step is faster than that of {named} at every shape", min(speed) > 1, said)
    said = (
        f"{named} takes {min(memory):.2f} to {max(memory):.2f} times its memory, median {statistics.median(memory):.2f}"
    )
    bench.report.finding(f"S²FT's step takes less memory than that of {named} at every shape", min(memory) > 1, said)


EXPERIMENT = Experiment(
    name="s2ft/efficiency",
    shows="S²FT, figure 5",
    question="How much time and memory does a step of S²FT save?",
    run=run,
    folder=Path(__file__).parent,
)
