"""Comparisons of methods by the trials of stage two."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.runner.bench import Bench, median_of
from experiments.runner.figures import band, panels

__all__ = ["Rows", "Verdict", "bars", "compared", "good", "loss_curve", "scores"]

Rows = Sequence[dict[str, Any]]
Value = str | Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Verdict:
    """How one method's trials compare with another's, pair by pair: same task, same seed.

    Attributes:
        difference: median over the pairs of first minus second.
        noise: how far trials of one method and task are apart by their seed alone: the median over methods and tasks
            of half the distance from the least to the greatest; nan where one seed is all there is.
        pairs: how many there are.
        said: the same in words.
    """

    difference: float
    noise: float
    pairs: int
    said: str

    @property
    def within(self) -> bool | None:
        """Whether the difference is no larger than the noise; None where that is not known."""
        return None if math.isnan(self.noise) else abs(self.difference) <= self.noise

    @property
    def not_higher(self) -> bool | None:
        """Whether the first is lower, or higher by no more than the noise; None where that is not known."""
        return None if math.isnan(self.noise) else self.difference <= self.noise

    @property
    def lower(self) -> bool | None:
        """Whether the first is lower by more than the noise; None where that is not known."""
        return None if math.isnan(self.noise) else self.difference < -self.noise

    @property
    def higher(self) -> bool | None:
        """Whether the first is higher by more than the noise; None where that is not known."""
        return None if math.isnan(self.noise) else self.difference > self.noise


def good(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """Returns the trials that went well and have some fields."""
    return [row for row in rows if "error" not in row and all(row[name] == each for name, each in wanted.items())]


def value_of(row: dict[str, Any], value: Value) -> Any:
    """Returns a field of a trial's line, or what a function makes of it."""
    return value(row) if callable(value) else row[value]


def compared(rows: Rows, first: str, second: str, value: Value = "loss", *, unit: str = "nats a token") -> Verdict:
    """Compares two methods by a value of their trials.

    Args:
        rows: lines of trials.
        first: a label.
        second: another.
        value: name of a field, or a function of a line; lower is not always better, see `Verdict`.
        unit: of the value.
    """
    found: dict[tuple[str, str, int], float] = {
        (row["label"], row["task"], row["seed"]): value_of(row, value) for row in good(rows)
    }
    pairs = [(key[1], key[2]) for key in found if key[0] == first and (second, *key[1:]) in found]
    if not pairs:
        return Verdict(float("nan"), float("nan"), 0, f"no trials of {first} and {second} to compare")
    differences = [found[first, *pair] - found[second, *pair] for pair in pairs]
    spreads = []
    for label in (first, second):
        for task in dict.fromkeys(task for task, _ in pairs):
            own = [found[label, task, seed] for its, seed in pairs if its == task]
            spreads += [(max(own) - min(own)) / 2] if len(own) > 1 else []
    difference, noise = statistics.median(differences), statistics.median(spreads) if spreads else math.nan
    alone = f"seeds alone ±{noise:.2g}" if spreads else "one seed, so that nobody knows what seeds do"
    said = f"{first} − {second}: median {difference:+.4g} {unit} over {len(pairs)} pairs of task and seed, {alone}"
    return Verdict(difference, noise, len(pairs), said)


def scores(bench: Bench, rows: Rows) -> list[dict[str, Any]]:
    """Returns a table: a method a row, with medians over seeds of loss and exact match on every task."""
    table = []
    for label in bench.labels:
        slots = median_of(rows, "slots", label=label)
        line: dict[str, Any] = {"method": label, "entries trained": None if slots is None else int(slots[0])}
        for task in bench.settings.tasks:
            loss = median_of(rows, "loss", label=label, task=task)
            match = median_of(rows, "exact_match", label=label, task=task)
            line[f"{task}, loss"] = None if loss is None else loss[0]
            line[f"{task}, %"] = None if match is None else 100 * match[0]
        for name, value in (("loss", "loss"), ("%", "exact_match")):
            medians = [median_of(rows, value, label=label, task=task) for task in bench.settings.tasks]
            there = [each[0] for each in medians if each is not None]
            mean = sum(there) / len(there) if len(there) == len(medians) else None
            line[f"mean, {name}"] = None if mean is None else mean * (100 if name == "%" else 1)
        table.append(line)
    return table


def loss_curve(
    panel: Axes, bench: Bench, rows: Rows, *, task: str, name: str, places: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Draws held-out losses along an axis as a band over seeds, and returns the data behind it, a line a trial.

    Args:
        panel: where.
        bench: the experiment's workplace.
        rows: lines of trials.
        task: of which the losses are.
        name: of the curve.
        places: from labels to places on the axis, in order; labels without trials that went well are left out.
    """
    there = {label: at for label, at in places.items() if good(rows, label=label, task=task)}
    losses = [
        [next((row["loss"] for row in good(rows, label=label, task=task, seed=seed)), math.nan) for label in there]
        for seed in bench.seeds
    ]
    if there:
        band(panel, list(there.values()), losses, name, marker="o")
    return [
        {"task": task, "curve": name, "place": at, "seed": seed, "loss": loss}
        for seed, own in zip(bench.seeds, losses, strict=True)
        for at, loss in zip(there.values(), own, strict=True)
    ]


def bars(
    bench: Bench,
    rows: Rows,
    value: Value,
    title: str,
    unit: str,
    name: str = "bars",
    *,
    tasks: Sequence[str] | None = None,
) -> None:
    """Adds a picture: a panel a task, a bar a method, from the least to the greatest over seeds as a whisker."""
    tasks = [task for task in (bench.settings.tasks if tasks is None else tasks) if good(rows, task=task)]
    if not tasks:
        bench.report.failure(f"the picture {name} has no data: no trial went well")
        return
    figure, drawn = panels(len(tasks), title=title, size=(max(4.0, 0.8 * len(bench.labels)), 4.2))
    data = []
    for panel, task in zip(drawn[0], tasks, strict=True):
        found = {label: median_of(rows, value, label=label, task=task) for label in bench.labels}
        found = {label: each for label, each in found.items() if each is not None}
        middles = np.array([each[0] for each in found.values()])
        whiskers = np.array([[m - low, high - m] for m, low, high in found.values()]).T
        panel.bar(list(found), middles, yerr=whiskers, capsize=3, color=[f"C{at}" for at in range(len(found))])
        panel.tick_params(axis="x", rotation=45)
        low, high = float((middles - whiskers[0]).min()), float((middles + whiskers[1]).max())
        room = high - low or 1.0
        # Differences between methods are small against the values: the axis begins below the least.
        floor = low - 0.5 * room if low < 0 else max(0.0, low - 0.5 * room)
        panel.set(title=task, xlabel="method", ylabel=unit, ylim=(floor, high + 0.1 * room))
        names = ("median", "least", "greatest")
        data += [
            {"task": task, "method": label, **dict(zip(names, each, strict=True))} for label, each in found.items()
        ]
    seeds = f"whiskers from the least to the greatest of {len(bench.seeds)} seeds"
    bench.report.picture(name, figure, data, f"{title}; {seeds}")
