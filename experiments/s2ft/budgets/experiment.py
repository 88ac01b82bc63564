"""S²FT, figure 2: what sparse, low-rank and full fine-tuning learn, and what becomes of other tasks, by budget."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import compared, good
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from experiments.runner.training import Tuned, task_rows
from experiments.s2ft.judge import Judge

__all__ = ["EXPERIMENT"]

_LAST = 10
"""Steps whose losses are the training loss: that of one batch says little."""
_KINDS = ("SpFT", "LoRA", "S²FT")
_PLACES = {"train": "training loss", "own": "loss, own task", "near": "loss, near", "far": "loss, far"}


def run(bench: Bench) -> None:
    """Compares kinds of fine-tuning at every budget, on their own task and on others."""
    suite = bench.settings.tasks[0].partition("/")[0]
    others = {place: list(bench.settings.more[place][suite]) for place in ("near", "far")}
    rows = [found | _places(bench, found) for found in good(bench.compare(_observer(others)))]
    before = _untuned(bench, others)
    _table(bench, rows, before, others)
    _picture(bench, rows, before)
    _findings(bench, rows)
    bench.report.text(
        "The paper prints no numbers of figure 2. It says: SpFT's training loss is below LoRA's at every ratio; loss "
        "rises and accuracy on easy tasks falls with the ratio; far from the task SpFT > full > LoRA."
    )


def _observer(others: Mapping[str, Sequence[str]]) -> Any:
    def other_tasks(tuned: Tuned) -> dict[str, Any]:
        """Means of loss and exact match over the tasks near and far, on as many rows as the task's own."""
        found = {}
        for place, tasks in others.items():
            measured = [
                tuned.measure(list(task_rows(tuned.data_root, task).test[: tuned.measured.rows])) for task in tasks
            ]
            found[place] = {
                "loss": float(np.mean([each.loss for each in measured])),
                "exact_match": float(np.mean([each.exact_match for each in measured])),
            }
        return found

    # The name is part of a trial's key: trials that measured other tasks are others.
    other_tasks.__name__ = f"other_tasks {json.dumps(others)}"
    return other_tasks


def _places(bench: Bench, row: dict[str, Any]) -> dict[str, float]:
    seen = row["observed_values"]
    losses = {place: seen[place]["loss"] for place in ("near", "far")}
    matches = {f"{place} %": 100 * seen[place]["exact_match"] for place in ("near", "far")}
    train = float(np.nanmean(bench.metrics(row, "loss")[-_LAST:]))
    return losses | matches | {"train": train, "own": row["loss"], "own %": 100 * row["exact_match"]}


def _untuned(bench: Bench, others: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """What the base does on the same rows."""
    judge, found = Judge(bench), {"train": float("nan")}
    for place, tasks in ({"own": bench.settings.tasks} | dict(others)).items():
        measured = [judge(judge.base, task) for task in tasks]
        found[place] = float(np.mean([each.loss for each in measured]))
        found[f"{place} %"] = 100 * float(np.mean([each.exact_match for each in measured]))
    return found


def _table(
    bench: Bench, rows: list[dict[str, Any]], before: dict[str, float], others: Mapping[str, Sequence[str]]
) -> None:
    columns = _PLACES | {"own %": "own task, %", "near %": "near, %", "far %": "far, %"}
    table: list[dict[str, Any]] = [{"method": "base, untuned", "entries trained": 0}]
    table[0] |= {title: before[name] for name, title in columns.items()}
    for label in bench.labels:
        if not good(rows, label=label):
            continue
        medians = {title: (median_of(rows, name, label=label) or [None])[0] for name, title in columns.items()}
        slots = median_of(rows, "slots", label=label)
        assert slots is not None  # there are rows
        table.append({"method": label, "entries trained": int(slots[0])} | medians)
    named = "; ".join(f"{place}: {', '.join(tasks)}" for place, tasks in others.items())
    bench.report.table(
        "budgets", table, f"Losses in nats a token and exact match in %, medians over seeds and tasks; {named}"
    )


def _picture(bench: Bench, rows: list[dict[str, Any]], before: dict[str, float]) -> None:
    figure, drawn = panels(4, title="Sparse, low-rank and full fine-tuning by budget", size=(4.2, 4.2))
    data = []
    for panel, (place, title) in zip(drawn[0], _PLACES.items(), strict=True):
        for kind in (*_KINDS, "full"):
            own = [label for label in bench.labels if label.split(" ")[0] == kind and good(rows, label=label)]
            points = [(median_of(rows, "slots", label=label), median_of(rows, place, label=label)) for label in own]
            found = [(slots[0], *values) for slots, values in points if slots is not None and values is not None]
            if not found:
                continue
            at, middle, low, high = np.array(sorted(found)).T
            panel.errorbar(at, middle, yerr=[middle - low, high - middle], marker="o", capsize=3, label=kind)
            data += [
                {"panel": title, "method": kind, "entries": int(x), "median": y}
                for x, y in zip(at, middle, strict=True)
            ]
        if np.isfinite(before[place]) and place != "own":
            panel.axhline(before[place], color="gray", linestyle="--", label="base, untuned")
        panel.set(title=title, xlabel="entries trained", ylabel="nats a token", xscale="log")
        panel.legend()
    bench.report.picture(
        "by_budget",
        figure,
        data,
        f"Losses by budget; whiskers from the least to the greatest of {len(bench.seeds)} seeds; lower is better",
    )


def _findings(bench: Bench, rows: list[dict[str, Any]]) -> None:
    budgets = [label.removeprefix("SpFT ") for label in bench.labels if label.startswith("SpFT ")]
    paired = _by_budget(rows, budgets)
    verdict = compared(paired, "SpFT", "LoRA", "train")
    bench.report.finding("SpFT's training loss is below LoRA's at the same budget", verdict.lower, verdict.said)
    for kind in _KINDS if len(budgets) > 1 else ():
        verdict = compared(rows, f"{kind} {budgets[0]}", f"{kind} {budgets[-1]}", "train")
        claim = f"the largest budget of {kind} memorizes more than the smallest (training loss)"
        bench.report.finding(claim, verdict.lower, verdict.said)
    for place, where in (("near", "near the task"), ("far", "far from it")):
        for first, second in (("SpFT", "LoRA"), ("S²FT", "LoRA"), ("SpFT", "full"), ("S²FT", "full")):
            verdict = compared(paired, first, second, place)
            bench.report.finding(f"{first} is better than {second} {where} (loss)", verdict.lower, verdict.said)


def _by_budget(rows: Sequence[dict[str, Any]], budgets: Sequence[str]) -> list[dict[str, Any]]:
    """The same trials by kind, each budget as a task of its own, so that all budgets are compared in one go."""
    found = []
    for row in rows:
        kind, _, budget = row["label"].partition(" ")
        found += [row | {"label": kind, "task": f"{row['task']}, {each}"} for each in ([budget] if budget else budgets)]
    return found


EXPERIMENT = Experiment(
    name="s2ft/budgets",
    shows="S²FT, figure 2",
    question="Does sparse fine-tuning learn as much as LoRA with as many parameters, and forget less than full does?",
    run=run,
    folder=Path(__file__).parent,
)
