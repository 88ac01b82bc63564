"""GASDU, figure 4: how much of the gradient the support keeps, step by step; and the adaptive period it proposes."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import compared, good
from experiments.runner.experiment import Experiment
from experiments.runner.figures import band, panels

__all__ = ["EXPERIMENT"]

_WINDOW = 25
"""Steps of the moving average (figure 4)."""


def run(bench: Bench) -> None:
    """Draws the retention over steps and compares the second half of training."""
    task = bench.settings.tasks[0]
    rows = bench.compare()
    curves = {row["key"]: np.array(bench.metrics(row, "retention_mean")) for row in good(rows)}
    late: dict[str, float] = {key: float(np.nanmean(curve[len(curve) // 2 :])) for key, curve in curves.items()}
    refreshes = {row["key"]: int(np.nansum(bench.metrics(row, "refreshed"))) for row in good(rows)}
    _draw(bench, rows, curves)

    def retained(row: dict[str, Any]) -> float:
        return late[row["key"]]

    table = []
    for label in bench.labels:
        middle, counts = (
            median_of(rows, retained, label=label),
            median_of(rows, lambda row: refreshes[row["key"]], label=label),
        )
        loss = median_of(rows, "loss", label=label)
        if middle is not None and counts is not None and loss is not None:
            table.append(
                {
                    "method": label,
                    "retention, second half": middle[0],
                    "supports picked": counts[0],
                    "held-out loss": loss[0],
                }
            )
    bench.report.table(
        "retention_late", table, f"Mean retention of the second half of training on {task}, and what it took"
    )
    for label in bench.labels:
        if label.startswith("M="):
            verdict = compared(rows, label, "fixed mask", retained, unit="of retention")
            bench.report.finding(f"retention with {label} stays above the fixed mask's", verdict.higher, verdict.said)
    _adaptive(bench, rows, retained, refreshes)
    bench.report.text(
        "The paper: about 85 % for M up to 200, falling to 65 % for a fixed mask; of norms, which are 72 % and 42 % of "
        "squares."
    )


def _draw(bench: Bench, rows: list[dict[str, Any]], curves: dict[str, np.ndarray]) -> None:
    figure, drawn = panels(title="Share of the squared gradient norm that the support keeps", size=(8.0, 4.5))
    panel, data = drawn[0, 0], []
    for label in bench.labels:
        own = [_smoothed(curves[row["key"]]) for row in good(rows, label=label)]
        if own:
            steps = np.arange(len(own[0])) + _WINDOW
            band(panel, steps, own, label)
            names = ("median", "least", "greatest")
            values = np.array([np.median(own, axis=0), np.min(own, axis=0), np.max(own, axis=0)]).T.tolist()
            data += [
                {"method": label, "step": int(step)} | dict(zip(names, each, strict=True))
                for step, each in zip(steps, values, strict=True)
            ]
    panel.set(xlabel="optimizer step", ylabel=f"retention, mean over matrices, {_WINDOW}-step average")
    panel.legend()
    bench.report.picture(
        "retention", figure, data, f"Retention over steps, median and range of {len(bench.seeds)} seeds"
    )


def _smoothed(curve: np.ndarray) -> np.ndarray:
    return np.convolve(curve, np.ones(_WINDOW) / _WINDOW, mode="valid")


def _adaptive(bench: Bench, rows: list[dict[str, Any]], retained: Any, refreshes: dict[str, int]) -> None:
    """The adaptive period against the fixed one that it comes closest to: more retention for as many refreshes?"""
    counts = {label: median_of(rows, lambda row: refreshes[row["key"]], label=label) for label in bench.labels}
    own = counts.get("adaptive")
    fixed = {label: each[0] for label, each in counts.items() if each is not None and label.startswith("M=")}
    if own is None or not fixed:
        return
    nearest = min(fixed, key=lambda label: abs(np.log(fixed[label] / own[0])))
    verdict = compared(rows, "adaptive", nearest, retained, unit="of retention")
    as_often = max(own[0], fixed[nearest]) <= 1.5 * min(own[0], fixed[nearest])
    bench.report.finding(
        f"an adaptive period keeps no less than {nearest}, which picks supports about as often",
        None if verdict.lower is None or not as_often else not verdict.lower,
        f"{own[0]:g} against {fixed[nearest]:g} supports; {verdict.said}",
    )


EXPERIMENT = Experiment(
    name="gasdu/retention",
    shows="GASDU, figure 4, and the adaptive period of its conclusion",
    question="How much of the gradient does an ageing support keep, and does picking by need beat the clock?",
    run=run,
    folder=Path(__file__).parent,
)
