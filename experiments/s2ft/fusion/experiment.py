"""S²FT, table 5: adapters of two tasks become one, and what is left of either task."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import compared
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from experiments.runner.training import Tuned
from experiments.s2ft.judge import Judge
from jaxsparse import deltas
from jaxsparse.common.errors import InputError

__all__ = ["EXPERIMENT"]

_FILE = "adapter.safetensors"
_OVERLAP, _APART = "S²FT fused (overlap)", "S²FT fused (non-overlap)"
# By name: the methods whose adapters of the first and of the second task are fused.
_FUSIONS = {
    "LoRA fused": ("LoRA", "LoRA"),
    _OVERLAP: ("S²FT", "S²FT"),
    _APART: ("S²FT", "S²FT, other channels"),
}


def saved_adapter(tuned: Tuned) -> dict[str, Any]:
    """Saves what changed beside the trial's metrics."""
    delta = tuned.job.tuner.delta(tuned.state, tuned.base().params)
    deltas.save(tuned.job.config.run.out / _FILE, delta, overwrite=True)
    return {"entries": delta.entries}


@dataclass(frozen=True)
class Pair:
    """Two adapters of one seed, of two tasks.

    Attributes:
        name: of their fusion.
        seed: of both.
        adapters: by task.
        rows: the trials that they are of, by task.
    """

    name: str
    seed: int
    adapters: Mapping[str, deltas.Delta]
    rows: Mapping[str, dict[str, Any]]


def run(bench: Bench) -> None:
    """Tunes on two tasks, fuses the adapters, and measures both tasks."""
    first, second = bench.settings.tasks
    again = [label for label in ("LoRA", "S²FT") if label in bench.labels]
    rows = bench.compare(saved_adapter, labels=again)
    if "S²FT, other channels" in bench.labels:
        rows += bench.compare(saved_adapter, labels=["S²FT, other channels"], tasks=[second])
    judge = Judge(bench)
    pairs = [pair for name in _FUSIONS for seed in bench.seeds if (pair := _pair(bench, rows, judge, name, seed))]
    found = [line for pair in pairs for line in _fused(bench, judge, pair)]
    alone = [line for pair in pairs if pair.name != _APART for line in _alone(judge, pair)]
    _table(bench, alone + found, (first, second))
    _picture(bench, found)
    _findings(bench, found)
    bench.report.printed(EXPERIMENT.folder / "paper.csv", "table 5, LLaMA-3-8B, mean accuracy in %")


def _pair(bench: Bench, rows: list[dict[str, Any]], judge: Judge, name: str, seed: int) -> Pair | None:
    chosen, adapters = {}, {}
    for label, task in zip(_FUSIONS[name], bench.settings.tasks, strict=True):
        row = next((r for r in rows if (r["label"], r["task"], r["seed"]) == (label, task, seed)), None)
        if row is None or "error" in row:
            return None
        file = bench.store.folder_of(row["key"]) / _FILE
        if not file.exists():
            raise InputError(f"{file} is gone; take the trial {row['key']} out of trials.jsonl to have it run again")
        chosen[task], adapters[task] = row, deltas.load(file, judge.base)
    return Pair(name, seed, adapters, chosen)


def _fused(bench: Bench, judge: Judge, pair: Pair) -> list[dict[str, Any]]:
    """Measures the fusion by the weight that is best on dev rows of both tasks; a line a task."""
    both = list(pair.adapters.values())
    judged = []
    for weight in bench.settings.more["weights"]:
        mixed = deltas.mix(both, base=judge.base, weights=[weight] * 2)
        params = deltas.apply(judge.base, mixed)
        judged.append((statistics.mean(judge(params, task, "dev").loss for task in pair.rows), weight))
    weight = min(judged)[1]
    params = deltas.apply(judge.base, deltas.mix(both, base=judge.base, weights=[weight] * 2))
    shared = deltas.overlap(both)[0]["share"]
    return [
        {
            "label": pair.name,
            "task": task,
            "seed": pair.seed,
            "weight": weight,
            "shared": shared,
            "lost": measured.loss - row["loss"],
            "loss": measured.loss,
            "exact_match": measured.exact_match,
        }
        for task, row in pair.rows.items()
        for measured in [judge(params, task)]
    ]


def _alone(judge: Judge, pair: Pair) -> list[dict[str, Any]]:
    """What the adapter of either task does on both of them."""
    lines = []
    for own, row in pair.rows.items():
        params = deltas.apply(judge.base, pair.adapters[own])
        for task in pair.rows:
            told = {"label": f"{row['label']}, {own}", "task": task, "seed": pair.seed, "weight": 1.0}
            if task == own:
                lines.append(told | {"loss": row["loss"], "exact_match": row["exact_match"]})
            else:
                measured = judge(params, task)
                lines.append(told | {"loss": measured.loss, "exact_match": measured.exact_match})
    return lines


def _table(bench: Bench, lines: list[dict[str, Any]], tasks: tuple[str, str]) -> None:
    table = []
    for label in dict.fromkeys(line["label"] for line in lines):
        weight = median_of(lines, "weight", label=label)
        shared = median_of(lines, lambda line: line.get("shared"), label=label)
        row: dict[str, Any] = {"adapters": label, "weight of each": None if weight is None else weight[0]}
        row["entries moved by both, %"] = None if shared is None else 100 * shared[0]
        for task in tasks:
            loss, match = (median_of(lines, value, label=label, task=task) for value in ("loss", "exact_match"))
            assert loss is not None  # every label has a line for both tasks
            assert match is not None
            row |= {f"{task}, loss": loss[0], f"{task}, %": 100 * match[0]}
        table.append(row)
    caption = "Held-out loss (nats a token) and exact match (%), medians over seeds; factors move all of their tensors"
    bench.report.table("fusion", table, caption)


def _picture(bench: Bench, found: list[dict[str, Any]]) -> None:
    tasks = bench.settings.tasks
    figure, drawn = panels(len(tasks), title="What fusing two adapters costs each task", size=(5.0, 4.6))
    data = []
    for panel, task in zip(drawn[0], tasks, strict=True):
        lost = {name: median_of(found, "lost", label=name, task=task) for name in _FUSIONS}
        there = {name: values for name, values in lost.items() if values is not None}
        middles = np.array([middle for middle, _, _ in there.values()])
        whiskers = np.array([[middle - low, high - middle] for middle, low, high in there.values()]).T
        colors = [f"C{at}" for at in range(len(there))]
        panel.bar([name.replace(" (", "\n(") for name in there], middles, yerr=whiskers, capsize=4, color=colors)
        panel.axhline(0.0, color="black", lw=0.8)
        panel.set(title=task, xlabel="adapters", ylabel="added loss, nats a token")
        data += [
            {"task": task, "adapters": name, "median": middle, "least": low, "greatest": high}
            for name, (middle, low, high) in there.items()
        ]
    least = f"whiskers from the least to the greatest of {len(bench.seeds)} seeds"
    caption = f"Held-out loss of the fusion less that of the task's own adapter alone; {least}"
    bench.report.picture("fusion_picture", figure, data, caption)


def _findings(bench: Bench, found: list[dict[str, Any]]) -> None:
    unit = "nats a token"
    verdict = compared(found, _APART, _OVERLAP, "loss", unit=unit)
    bench.report.finding("fused without overlap S²FT does better than with overlap", verdict.lower, verdict.said)
    for value, claim in (
        ("loss", "fused without overlap S²FT does better than fused LoRA"),
        ("lost", "fusion without overlap costs S²FT less than fusion costs LoRA"),
    ):
        verdict = compared(found, _APART, "LoRA fused", value, unit=unit)
        bench.report.finding(claim, verdict.lower, verdict.said)
    verdict = compared(found, _OVERLAP, "LoRA fused", "lost", unit=unit)
    bench.report.finding("fusion with overlap costs S²FT more than fusion costs LoRA", verdict.higher, verdict.said)


EXPERIMENT = Experiment(
    name="s2ft/fusion",
    shows="S²FT, table 5",
    question="Can adapters of two tasks be added up, and does it help that they moved different channels?",
    run=run,
    folder=Path(__file__).parent,
)
