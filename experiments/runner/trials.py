"""Trials: one training run each, measured, and kept as a line of a file that a later call goes on from."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from experiments.runner.training import Tuned, tune
from jaxsparse.common.errors import InputError, Stopped
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.numbers import finite_or_none
from jaxsparse.evaluate.suites import TrainFrom, load_task
from jaxsparse.models.checkpoints import load

__all__ = ["Observe", "Trial", "TrialStore", "Work", "short_hash"]

Observe = Callable[[Tuned], dict[str, Any]]
"""What an experiment wants to know of a tuned model beyond loss and exact match, as JSON can hold it."""
Work = Callable[["Trial"], dict[str, Any]]
"""What an experiment does in the place of tuning and measuring; it returns `loss` and what else the line shall hold."""


@dataclass(frozen=True)
class Trial:
    """What a training run depends on; of the base and the rows their names.

    Attributes:
        model: where the model lies.
        task: the task's name.
        label: what tables call the method.
        method: the method's name.
        options: its own options.
        lr: learning rate.
        batch: rows of a batch.
        seed: the only source of randomness.
        steps: optimizer steps, or None.
        epochs: passes over the data, or None.
        rows: so many training rows, or None for all.
        measured_on: "dev" or "test".
        measured_rows: so many of those rows, or None for all.
        common: whatever else the run is told, by the names of the configuration.
        observed: name of the function that looked at the tuned model.
    """

    model: str
    task: str
    label: str
    method: str
    options: dict[str, Any]
    lr: float
    batch: int
    seed: int
    steps: int | None
    epochs: float | None
    rows: int | None = None
    measured_on: str = "test"
    measured_rows: int | None = None
    common: dict[str, Any] = field(default_factory=dict)
    observed: str = ""

    @property
    def key(self) -> str:
        """A short name that no other trial has."""
        return short_hash(json.dumps(asdict(self), sort_keys=True, default=str))


class TrialStore:
    """A file of trials and what came of them, one JSON object a line; experiments share those that they have in common.

    Args:
        folder: where `trials.jsonl` and a folder for every trial's metrics lie.
        data_root: where the data lie.
        versions: of the packages that a trial depends on; a trial of other versions, of other rows or of another base
            of the same name is run again.

    Attributes:
        folder: the same.
        versions: the same.
        used: the lines of all trials that were asked for.
    """

    def __init__(self, folder: Path, data_root: Path, versions: dict[str, str]):
        self.folder, self.versions = folder, versions
        self._data_root = data_root
        self._file = folder / "trials.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._known = {row["key"]: row for row in self._read() if row["versions"] == versions and "error" not in row}
        self._made_of = cache(partial(_fingerprint, data_root))
        self.used: list[dict[str, Any]] = []

    def _read(self) -> Iterable[dict[str, Any]]:
        """The whole lines of the file: a killed run may have left half of one."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def folder_of(self, key: str) -> Path:
        """Where a trial's metrics lie, by its key."""
        return self.folder / "trials" / key

    def made_of(self, trial: Trial) -> str:
        """A fingerprint of what a trial's key only names: the rows of its task, and the base; "" where they are not."""
        return self._made_of(trial.model, trial.common["dtype"], trial.task, trial.common["train_from"])

    def knows(self, trial: Trial) -> bool:
        """Whether a trial is done."""
        row = self._known.get(trial.key)
        return row is not None and row.get("made_of") == self.made_of(trial)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The lines of the trials of this call that failed."""
        return [row for row in self.used if "error" in row]

    def run(self, trial: Trial, observe: Observe | None = None, work: Work | None = None) -> dict[str, Any]:
        """Returns a trial's line: what an earlier call found, or what training now finds.

        What goes wrong in a trial stands in its line under `error`, and the others go on.

        Args:
            trial: the trial.
            observe: what else to find out about the tuned model; the line holds it under `observed_values`.
            work: what to do instead of tuning and measuring.
        """
        if self.knows(trial):
            row = self._known[trial.key]
        else:
            about = {"versions": self.versions, "made_of": self.made_of(trial)}
            _begin(self.folder_of(trial.key), about)
            result = self._result(trial, work or partial(self._tune, observe))
            row = {"key": trial.key, **about, **asdict(trial), **result}
            with self._file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(row, allow_nan=False, default=str) + "\n")
            if "error" not in row:
                self._known[trial.key] = row
        self.used.append(row)
        return row

    def _tune(self, observe: Observe | None, trial: Trial) -> dict[str, Any]:
        tuned = tune(trial, self.folder_of(trial.key), self._data_root)
        if observe is None or not math.isfinite(tuned.result["loss"]):
            return tuned.result
        return tuned.result | {"observed_values": observe(tuned)}

    def _result(self, trial: Trial, work: Work) -> dict[str, Any]:
        start = time.monotonic()
        try:
            found = work(trial)
            if not math.isfinite(found["loss"]):
                return {"error": f"diverged: the loss is {found['loss']} with lr={trial.lr}", "loss": None}
            return _for_json({"seconds": round(time.monotonic() - start, 2)} | found)
        except (InputError, FileNotFoundError) as error:
            return {"error": " ".join(str(error).split())}
        except Stopped:
            raise
        except Exception as error:  # one trial's crash must not cost the others
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}


def short_hash(text: str) -> str:
    """Returns 16 hexadecimal digits that no other text has."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _for_json(value: Any) -> Any:
    """The value with None for numbers that are not finite, wherever they are."""
    if isinstance(value, dict):
        return {name: _for_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(each) for each in value]
    return finite_or_none(value) if isinstance(value, float) else value


def _fingerprint(data_root: Path, model: str, dtype: str, task: str, train_from: TrainFrom) -> str:
    try:
        rows, base = load_task(data_root, task, train_from=train_from), load(model, dtype=dtype)
    except (InputError, FileNotFoundError):  # running it will say so
        return ""
    return short_hash(repr((rows.train, rows.dev, rows.test, base.fingerprint)))


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Empties a trial's folder of what another base, other rows or other versions left: a run would go on from it."""
    file = folder / "about.json"
    if folder.exists() and (not file.exists() or json.loads(file.read_text(encoding="utf-8")) != about):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(about) + "\n")
