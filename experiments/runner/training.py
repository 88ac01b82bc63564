"""One trial: fine-tunes a model as `jaxsparse finetune` does, in this process, and measures it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.engine.description import count_slots
from jaxsparse.engine.tuner import TunerState
from jaxsparse.evaluate.held_out import HeldOut, Measurement, encode_held_out, measure
from jaxsparse.evaluate.suites import TaskRows, TrainFrom, load_task, question_of
from jaxsparse.methods.registry import options_class
from jaxsparse.models.checkpoints import Checkpoint, load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.config import DataConfig, FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxsparse.train.loop import train
from jaxsparse.train.optimizer import learning_rate
from jaxsparse.train.prepare import Job, prepare

if TYPE_CHECKING:
    from experiments.runner.trials import Trial

__all__ = ["Tuned", "config_of", "encode_as_told", "parts_of", "read_metrics", "task_rows", "tune"]


@dataclass(frozen=True)
class Tuned:
    """A tuned model, and what tuning it was like.

    Attributes:
        job: the run as it was prepared; its parameters are gone.
        state: the last state.
        params: the tuned parameters.
        task: the rows of the task.
        trained: those that were trained on.
        measured: on the trial's dev or test rows.
        metrics: a mapping for every step: loss, retention, …
        result: what the trial's line holds.
        data_root: where the data lie.
    """

    job: Job
    state: TunerState
    params: Any
    task: TaskRows
    trained: list[Row]
    measured: Measurement
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    data_root: Path

    @property
    def model(self) -> LanguageModel:
        """The model's functions."""
        return self.job.model

    def base(self) -> Checkpoint:
        """The model before, read again: training took over its memory."""
        return load(self.job.config.base.model, dtype=self.job.config.base.dtype)

    def measure(self, rows: list[Row], *, params: Any = None) -> Measurement:
        """Loss and exact match on other rows, of the tuned model or of other parameters."""
        held_out = encode_as_told(self.job.config.rows, self.model, self.job.tokenizer, rows)
        return measure(self.model, self.params if params is None else params, self.job.tokenizer, held_out)


def config_of(trial: Trial, folder: Path, data_root: Path) -> FinetuneConfig:
    """Returns a trial as `jaxsparse finetune` would be told of it."""
    common = trial.common
    return FinetuneConfig(
        base=ModelConfig(trial.model, dtype=common["dtype"]),
        rows=DataConfig(
            data_root / trial.task,
            batch=trial.batch,
            max_length=common["max_length"],
            max_new_tokens=common["max_new_tokens"],
            train_on=common["train_on"],
            too_long="drop",
        ),
        run=RunConfig(out=folder, steps=trial.steps, epochs=trial.epochs, seed=trial.seed, resume=True),
        chosen_method=options_class(trial.method)(**trial.options),
        method=trial.method,
        inner=OptimizerConfig(
            optimizer=common["optimizer"],
            lr=trial.lr,
            schedule=common["schedule"],
            warmup_steps=common["warmup_steps"],
            clip=common["clip"],
            weight_decay=common["weight_decay"],
        ),
        engine=common["engine"],
        targets=common["targets"],
    )


@lru_cache(maxsize=32)
def task_rows(data_root: Path, name: str, train_from: TrainFrom = "own") -> TaskRows:
    """Returns `load_task`'s rows, read once: trial after trial wants them."""
    return load_task(data_root, name, train_from=train_from)


def encode_as_told(told: DataConfig, model: LanguageModel, tokenizer: Tokenizer, rows: Sequence[Row]) -> HeldOut:
    """Returns rows as a trial's own are encoded to be measured on.

    Args:
        told: lengths, template and field of the trial.
        model: the language model.
        tokenizer: its tokenizer.
        rows: the rows.
    """
    return encode_held_out(
        model,
        tokenizer,
        rows,
        max_length=told.max_length,
        max_new_tokens=told.max_new_tokens,
        template=told.template,
        train_on=told.train_on,
        too_long=told.too_long,
    )


def tune(trial: Trial, folder: Path, data_root: Path) -> Tuned:
    """Trains and measures.

    Args:
        trial: what to do.
        folder: where metrics and checkpoints go; a trial that was killed goes on from there.
        data_root: where the data lie.

    Returns:
        The tuned model.

    Raises:
        InputError: something in the trial, the data or the model does not work.
    """
    start = time.monotonic()
    task = task_rows(data_root, trial.task, trial.common["train_from"])
    parts = parts_of(task, trial.common["train_from"])
    rows = parts[trial.measured_on][: trial.measured_rows]
    config = config_of(trial, folder, data_root)
    folder.mkdir(parents=True, exist_ok=True)
    trained = parts["train"][: trial.rows]
    job = prepare(config, trained, rows)
    slots = count_slots(job.method, job.base.params)
    rate = learning_rate(config.inner, job.steps)
    state, totals = train(
        job.tuner,
        job.base.params,
        job.data,
        config.run,
        job.steps,
        rate=rate,
        base_fingerprint=job.base.fingerprint,
        sharding=job.sharding,
    )
    params = job.tuner.params(state)
    assert job.held_out is not None  # there are rows, or load_task had complained
    measured = measure(job.model, params, job.tokenizer, job.held_out)
    metrics = read_metrics(folder)
    retention = totals.retention_at_refresh
    result = {
        "loss": measured.loss,
        "exact_match": measured.exact_match,
        "measured": measured.rows,
        "train_loss": metrics[-1]["loss"] if metrics else None,
        "slots": slots,
        "steps_done": job.steps,
        "engine": job.engine,
        "tokens_per_second": totals.tokens_per_second,
        "retention_at_refresh": sum(retention) / len(retention) if retention else None,
        "skipped": totals.skipped,
        "seconds": round(time.monotonic() - start, 2),
    }
    return Tuned(job, state, params, task, trained, measured, metrics, result, data_root)


def parts_of(task: TaskRows, train_from: TrainFrom = "own") -> dict[str, list[Row]]:
    """Returns a task's train, dev and test rows as trials take them.

    Where a task has no dev rows, every tenth training row is one; nothing is trained on that asks the same. Rows of a
    suite lie task by task in their file: they are mixed, so that the first so many are of all tasks.

    Args:
        task: the task.
        train_from: whose training rows they are, see `load_task`.
    """
    train, dev = list(task.train), list(task.dev)
    if train_from == "suite":
        train = [train[at] for at in np.random.default_rng(0).permutation(len(train))]
    if not dev:
        dev = train[::10]
        asked = {question_of(row) for row in dev}
        train = [row for row in train if question_of(row) not in asked]
    return {"train": train, "dev": dev, "test": list(task.test)}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of every step of a trial, from its folder."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
