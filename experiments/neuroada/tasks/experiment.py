"""NeuroAda, tables 2 and 3: trained on a suite's rows together, measured on every task of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import bars, compared, good
from experiments.runner.elsewhere import on_other_tasks
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]

_SUITES = {"commonsense": "commonsense reasoning", "math": "arithmetic reasoning"}


def run(bench: Bench) -> None:
    """Trains every method once a seed on each suite, and compares the means over the suite's tasks."""
    rows: list[dict[str, Any]] = []
    for task in bench.settings.tasks:
        suite = task.partition("/")[0]
        observe = on_other_tasks(bench.settings.more["measured"][suite], rows=bench.settings.test_rows)
        rows += [row | {"task": suite} | _means(row) for row in good(bench.compare(observe, tasks=[task]))]
    suites = [suite for suite in _SUITES if good(rows, task=suite)]
    for suite in suites:
        bench.report.table(suite, _table(bench, rows, suite), f"{_SUITES[suite].capitalize()}, medians over seeds in %")
    bars(bench, rows, "mean accuracy", "Mean accuracy over a suite's tasks, generated answers", "%", tasks=suites)
    for suite in suites:
        for first in ("NeuroAda k=20", "NeuroAda k=1"):
            for other in bench.settings.more["against"].get(first, []):
                verdict = compared(good(rows, task=suite), first, other, "mean accuracy", unit="points")
                claim = f"{first} does better than {other} on {_SUITES[suite]} (mean accuracy)"
                bench.report.finding(claim, verdict.higher, verdict.said)
                verdict = compared(good(rows, task=suite), first, other, "mean loss")
                claim = f"{first} does better than {other} on {_SUITES[suite]} (mean loss)"
                bench.report.finding(claim, verdict.lower, verdict.said)
    folder = EXPERIMENT.folder
    bench.report.printed(folder / "paper_2.csv", "table 2, LLaMA-7B and LLaMA-3-8B, accuracy in %")
    bench.report.printed(folder / "paper_3.csv", "table 3, LLaMA-7B and LLaMA-3-8B, accuracy in %")


def _means(row: Mapping[str, Any]) -> dict[str, float]:
    seen = row["observed_values"].values()
    likelihoods = [task["likelihood"] for task in seen if "likelihood" in task]
    return {
        "mean accuracy": 100 * float(np.mean([task["exact_match"] for task in seen])),
        "mean likelihood": 100 * float(np.mean(likelihoods)) if likelihoods else float("nan"),
        "mean loss": float(np.mean([task["loss"] for task in seen])),
    }


def _table(bench: Bench, rows: Sequence[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    """A method a row: accuracy of generated answers by task, their mean, and that of the likeliest labels."""
    table = []
    for label in bench.labels:
        own = good(rows, task=suite, label=label)
        if not own:
            continue
        line: dict[str, Any] = {"method": label, "entries trained": own[0]["slots"]}
        for task in bench.settings.more["measured"][suite]:
            line[task.partition("/")[2]] = 100 * float(
                np.median([row["observed_values"][task]["exact_match"] for row in own])
            )
        named = {"mean accuracy": "mean", "mean likelihood": "mean by likelihood", "mean loss": "mean loss, nats"}
        for value, title in named.items():
            middle = median_of(own, value)
            line[title] = None if middle is None else middle[0]
        table.append(line)
    chance = [each["chance"] for each in good(rows, task=suite)[0]["observed_values"].values() if "chance" in each]
    if chance:
        table.append(dict.fromkeys(table[0]) | {"method": "chance", "mean by likelihood": 100 * float(np.mean(chance))})
    return table


EXPERIMENT = Experiment(
    name="neuroada/tasks",
    shows="NeuroAda, tables 2 and 3",
    question="How well do 1 and 20 inputs of every neuron tune, against other methods with as many entries?",
    run=run,
    folder=Path(__file__).parent,
)
