"""Beyond LoRA, tables 2, 4 and 5: full fine-tuning, LoRA and its past, present and sparse variants on tasks."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.beyond_lora.observed import gap_and_intruders
from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import bars, compared, good, scores
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]

_PARENTS = {"cla": "asym_lora", "r_cla": "asym_lora", "c3la": "rac_lora", "r_c3la": "rac_lora"}
"""What each sparse variant makes cheaper."""
_ROUNDING = 1e-3
"""Two runs that are equal but for rounding end closer than this, in nats a token."""


def run(bench: Bench) -> None:
    """Compares all methods on every task, the sparse variants with their parents, and paca with r_cla."""
    rows = bench.compare(gap_and_intruders)
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    bars(bench, rows, "loss", "Held-out loss by method", "nats a token")
    _best(bench, rows)
    for sparse, parent in _PARENTS.items():
        verdict = compared(rows, sparse, parent)
        bench.report.finding(f"{sparse} is no worse than {parent}, whose A is dense", verdict.not_higher, verdict.said)
        verdict = compared(rows, sparse, "lora")
        bench.report.finding(f"{sparse} is no worse than LoRA", verdict.not_higher, verdict.said)
    _same_as_paca(bench, rows)
    bench.report.text("The paper takes the epoch that is best on validation rows (table 7); here the last step counts.")
    folder = EXPERIMENT.folder
    bench.report.printed(
        folder / "paper.csv", "tables 2 and 18, some text models, r = 16; perplexity is better when lower"
    )
    bench.report.printed(folder / "paper_paca.csv", "tables 4 and 5, text models, accuracy in % and 100 MCC")


def _best(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """No method is far ahead: the best by median loss against the second; paca is r_cla once more."""
    for task in bench.settings.tasks:
        found = {label: median_of(rows, "loss", label=label, task=task) for label in bench.labels if label != "paca"}
        order = sorted((each[0], label) for label, each in found.items() if each is not None)
        if len(order) > 1:
            verdict = compared(good(rows, task=task), order[0][1], order[1][1])
            claim = f"no single method does far better than the others ({task}: the best against the second)"
            bench.report.finding(claim, None if verdict.lower is None else not verdict.lower, verdict.said)


def _same_as_paca(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Appendix B.2: with alpha = r, the same rows and no weight decay, r_cla and paca take the same steps."""
    found = {(row["label"], row["task"], row["seed"]): row for row in good(rows)}
    table = []
    for (label, task, seed), row in found.items():
        other = found.get(("paca", task, seed))
        if label != "r_cla" or other is None:
            continue
        curves = [np.array(bench.metrics(each, "loss")) for each in (row, other)]
        table.append(
            {
                "task": task,
                "seed": seed,
                "r_cla, loss": row["loss"],
                "paca, loss": other["loss"],
                "largest difference of a step's training loss": float(np.max(np.abs(curves[0] - curves[1]))),
            }
        )
    if not table:
        return
    bench.report.table("paca", table, "r_cla with alpha = r beside paca, nats a token")
    largest = max(abs(line["r_cla, loss"] - line["paca, loss"]) for line in table)
    said = f"held-out losses of {len(table)} pairs of task and seed differ by at most {largest:.2g} nats a token"
    bench.report.finding("paca is r_cla with alpha = r, up to rounding", largest < _ROUNDING, said)


EXPERIMENT = Experiment(
    name="beyond_lora/tasks",
    shows="Beyond LoRA, tables 2, 4 and 5",
    question="Do LoRAs whose A only chooses inputs tune as well as those whose A is dense?",
    run=run,
    folder=Path(__file__).parent,
)
