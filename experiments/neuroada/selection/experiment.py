"""NeuroAda, figure 7: by what the trained inputs of every neuron are picked."""

from itertools import combinations
from pathlib import Path

from experiments.runner.bench import Bench
from experiments.runner.comparison import bars, compared, scores
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]

_RULES = ("magnitude", "gradient", "reverse", "random")


def run(bench: Bench) -> None:
    """Compares the four rules, pair by pair, at every budget."""
    rows = bench.compare()
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    bars(bench, rows, "loss", "Held-out loss by rule and inputs of a neuron", "nats a token")
    # A label is a rule and a budget: each budget becomes a task of its own, so that all are compared in one go.
    split = [row | dict(zip(("label", "task"), _by_rule(row["label"], row["task"]), strict=True)) for row in rows]
    within = []
    for first, second in combinations(_RULES, 2):
        verdict = compared(split, first, second)
        within.append(verdict.within)
        said = f"{first} and {second} do equally well (within what seeds do)"
        bench.report.finding(said, verdict.within, verdict.said)
    said = f"{within.count(True)} of {len(within)} pairs are within what seeds do"
    bench.report.finding("all four rules do about equally well", None if None in within else all(within), said)
    bench.report.text(
        "The paper prints averages over budgets of LLaMA-7B: 77.69 to 79.24 % on Commonsense15K and 35.89 to 36.54 % "
        "on GSM8K for the four rules."
    )


def _by_rule(label: str, task: str) -> tuple[str, str]:
    rule, _, budget = label.partition(" ")
    return rule, f"{task}, {budget}"


EXPERIMENT = Experiment(
    name="neuroada/selection",
    shows="NeuroAda, figure 7",
    question="Does it matter which inputs of a neuron are trained?",
    run=run,
    folder=Path(__file__).parent,
)
