"""What an experiment works with: its settings, its trials, and the protocol that all comparisons follow."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.runner.report import Report
from experiments.runner.settings import Scale, Settings
from experiments.runner.training import read_metrics
from experiments.runner.trials import Observe, Trial, TrialStore, Work
from jaxsparse.common.errors import InputError

__all__ = ["Bench", "median_of"]

_COMMON = (
    *("max_length", "max_new_tokens", "train_on", "optimizer", "schedule", "warmup_steps", "clip", "weight_decay"),
    *("targets", "dtype", "engine", "train_from"),
)
_OF_A_TRIAL = {*_COMMON, "lr", "batch", "steps", "epochs"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """An experiment's workplace.

    Attributes:
        settings: of the scale.
        scale: which scale.
        folder: where its results go.
        data_root: where the data lie.
        store: runs trials, and knows those that are done.
        report: takes tables, pictures and findings.
        tell: is told of every trial that was run, by its line.
    """

    settings: Settings
    scale: Scale
    folder: Path
    data_root: Path
    store: TrialStore
    report: Report
    tell: Callable[[dict[str, Any]], None]

    @property
    def seeds(self) -> range:
        """The seeds of stage two."""
        return range(self.settings.seeds)

    @property
    def labels(self) -> list[str]:
        """The methods to compare, as tables show them."""
        return list(self.settings.methods)

    def trial(self, label: str, task: str, seed: int = 0, **changes: Any) -> Trial:
        """Returns a trial of a method on a task, by the settings but for some changes.

        Args:
            label: of the method in the settings.
            task: the task.
            seed: the trial's seed.
            **changes: fields of `Trial`, settings such as `max_length`, or the method's own `options`, which are laid
                over those of the settings.
        """
        told = dict(self.settings.methods[label])
        method = told.pop("method", label)
        given = {name: getattr(self.settings, name) for name in _OF_A_TRIAL}
        given |= {name: told.pop(name) for name in list(told) if name in _OF_A_TRIAL}
        options = told | changes.pop("options", {})
        given |= {name: changes.pop(name) for name in list(changes) if name in _OF_A_TRIAL}
        return Trial(
            **{
                "model": self.settings.model,
                "task": task,
                "label": label,
                "method": method,
                "options": options,
                "lr": _first(given["lr"]),
                "batch": int(_first(given["batch"])),
                "seed": seed,
                "steps": given["steps"],
                "epochs": given["epochs"],
                "rows": self.settings.train_rows,
                "measured_rows": self.settings.test_rows,
                "common": {name: given[name] for name in _COMMON},
            }
            | changes
        )

    def run(self, trial: Trial, observe: Observe | None = None, work: Work | None = None) -> dict[str, Any]:
        """Runs a trial, unless it is done, and returns its line; see `TrialStore.run`.

        Args:
            trial: the trial.
            observe: what else to find out about the tuned model; the line holds it under `observed_values`.
            work: trains and measures in the experiment's own way instead; `trial.observed` then says what that depends
                on beyond the trial.
        """
        if observe is not None:
            trial = dataclasses.replace(trial, observed=observe.__name__)
        known = self.store.knows(trial)
        row = self.store.run(trial, observe, work)
        if not known:
            self.tell(row)
        return row

    def metrics(self, row: dict[str, Any], name: str) -> list[float]:
        """Returns one metric of every step of a trial that is done; a step that has none gives nan."""
        metrics = read_metrics(self.store.folder_of(row["key"]))
        return [float("nan") if line.get(name) is None else line[name] for line in metrics]

    def grid(self, label: str) -> list[dict[str, Any]]:
        """Returns the learning rates and batches that stage one tries for a method, as changes of its trials."""
        options = self.settings.methods[label] or {}
        rates = _all(options.get("lr", self.settings.lr))
        batches = _all(options.get("batch", self.settings.batch))
        return [{"lr": float(rate), "batch": int(batch)} for rate in rates for batch in batches]

    def tuned(self, label: str, task: str) -> dict[str, Any]:
        """Stage one: the learning rate and batch that do best on the dev rows after a short run (GASDU, section 5).

        By exact match, then by loss. A grid of one point is not searched.
        """
        points = self.grid(label)
        if len(points) == 1:
            return points[0]
        steps, epochs = self.settings.search_steps, self.settings.search_epochs
        found = []
        for point in points:
            length = {"steps": steps, "epochs": None if steps else epochs}
            rows = {"measured_on": "dev", "measured_rows": self.settings.dev_rows}
            row = self.run(self.trial(label, task, **point, **length, **rows))
            if "error" not in row:
                found.append((-row["exact_match"], row["loss"], point))
        if not found:
            raise InputError(f"{label} on {task}: every trial of the grid search failed; see trials.jsonl")
        return min(found, key=lambda each: each[:2])[2]

    def compare(
        self,
        observe: Observe | None = None,
        *,
        labels: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        **changes: Any,
    ) -> list[dict[str, Any]]:
        """Both stages of the protocol for all methods on all tasks: the lines of stage two, one for every seed."""
        rows = []
        for task in tasks or self.settings.tasks:
            for label in labels or self.labels:
                try:
                    point = self.tuned(label, task)
                except InputError as error:
                    self.report.failure(str(error))
                    continue
                rows += [self.run(self.trial(label, task, seed, **point, **changes), observe) for seed in self.seeds]
        return rows


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _all(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def median_of(
    rows: Sequence[dict[str, Any]], value: str | Callable[[dict[str, Any]], Any], **wanted: Any
) -> tuple[float, float, float] | None:
    """Median, least and greatest of a value over the trials that went well.

    Args:
        rows: lines of trials.
        value: name of a field, or a function of a line.
        **wanted: fields that a line must have, such as `label="gasdu"`.

    Returns:
        The three numbers; None where there is no such trial.
    """
    chosen = [row for row in rows if "error" not in row and all(row[name] == each for name, each in wanted.items())]
    values = [value(row) if callable(value) else row[value] for row in chosen]
    values = [each for each in values if each is not None]
    return (statistics.median(values), min(values), max(values)) if values else None
