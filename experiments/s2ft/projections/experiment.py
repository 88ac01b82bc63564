"""S²FT, figure 4: which projections to train at one budget."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import bars, compared, good, scores
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]

_GROUPS = {"query/key": ("query", "key"), "value/up/gate": ("value", "up", "gate"), "output/down": ("output", "down")}


def run(bench: Bench) -> None:
    """Trains every kind of projection alone, then the best two with the other seeds, and compares groups of kinds."""
    rows, best = _trials(bench)
    table = scores(bench, rows)
    for line in table:
        line["seeds"] = len({row["seed"] for row in good(rows, label=line["method"])})
    bench.report.table("scores", table, "Held-out loss (nats a token) and exact match (%), medians over seeds")
    bars(bench, rows, "loss", "Held-out loss by trained projection", "nats a token")
    _findings(bench, rows, best)
    bench.report.text(
        "The paper prints no numbers of figure 4; its text has the order query/key ≪ value/up/gate < output/down."
    )


def _trials(bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    """All kinds with the first seeds, and the best two of them with the rest."""
    first = bench.settings.more.get("seeds_of_all", bench.settings.seeds)
    points = {(task, label): bench.tuned(label, task) for task in bench.settings.tasks for label in bench.labels}

    def trial(task: str, label: str, seed: int) -> dict[str, Any]:
        return bench.run(bench.trial(label, task, seed, **points[task, label]))

    rows = [trial(*point, seed) for point in points for seed in bench.seeds[:first]]
    medians = {label: median_of(rows, "loss", label=label) for label in bench.labels}
    order = sorted((middle[0], label) for label, middle in medians.items() if middle is not None)
    best = [label for _, label in order[:2]]
    rows += [trial(*point, seed) for point in points if point[1] in best for seed in bench.seeds[first:]]
    return rows, best


def _findings(bench: Bench, rows: Sequence[dict[str, Any]], best: Sequence[str]) -> None:
    # Only what has the same seeds compares: all kinds have the first.
    losses = {label: [row["loss"] for row in good(rows, label=label, seed=0)] for label in bench.labels}
    means = {
        name: statistics.mean(loss for label in group for loss in losses.get(label, []))
        for name, group in _GROUPS.items()
        if any(losses.get(label) for label in group)
    }
    ranges = [median_of(rows, "loss", label=label) for label in best]
    noise = statistics.median([(high - low) / 2 for _, low, high in ranges if high > low] or [0.0])  # type: ignore[misc]
    for better, worse in (("value/up/gate", "query/key"), ("output/down", "value/up/gate")):
        if better in means and worse in means:
            said = (
                f"mean loss {means[better]:.4g} against {means[worse]:.4g} nats a token with the first seed; "
                f"seeds alone ±{noise:.2g}, from {' and '.join(best)}"
            )
            bench.report.finding(f"{better} does better than {worse}", means[worse] - means[better] > noise, said)
    if {"output + down", "down"} <= set(bench.labels):
        verdict = compared(rows, "output + down", "down")
        claim = "output and down together, which the paper goes on with, do no worse than down alone"
        bench.report.finding(claim, verdict.not_higher, verdict.said)


EXPERIMENT = Experiment(
    name="s2ft/projections",
    shows="S²FT, figure 4",
    question="Which projections are best trained, when each gets as many parameters?",
    run=run,
    folder=Path(__file__).parent,
)
