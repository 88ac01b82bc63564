"""What a model does on tasks beside the one that it is tuned on."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.runner.training import Tuned, encode_as_told, task_rows
from experiments.runner.trials import Observe
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.held_out import measure
from jaxsparse.evaluate.multiple_choice import measure_choices
from jaxsparse.evaluate.suites import question_of
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.config import DataConfig

__all__ = ["measure_tasks", "on_other_tasks"]

_CHOICES = ("option", "truth", "letter")
"""Metrics of tasks that let one choose."""


def measure_tasks(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    told: DataConfig,
    *,
    data_root: Path,
    tasks: Sequence[str],
    rows: int | None,
    trained: Collection[Row] = (),
) -> dict[str, dict[str, Any]]:
    """Measures a model on tasks; test questions that it was trained on are left out.

    Args:
        model: its functions.
        params: its parameters.
        tokenizer: its tokenizer.
        told: lengths and template of a trial.
        data_root: where the data lie.
        tasks: their names.
        rows: so many of the first test rows; None: all.
        trained: the rows that the model is, or will be, trained on.

    Returns:
        For every task `loss`, `exact_match` of generated answers, `right`: whether each is, `rows`, and for multiple
        choice `likelihood`: accuracy of the likeliest label, and `chance`.
    """
    asked = {question_of(row) for row in trained}
    found: dict[str, dict[str, Any]] = {}
    for name in tasks:
        task = task_rows(data_root, name)
        chosen = [row for row in task.test if question_of(row) not in asked][:rows]
        held_out = encode_as_told(told, model, tokenizer, chosen)
        measured = measure(model, params, tokenizer, held_out)
        found[name] = {"loss": measured.loss, "exact_match": measured.exact_match, "rows": measured.rows}
        found[name]["right"] = list(measured.right)
        if task.task.metric in _CHOICES:
            options: dict[str, Any] = {"max_length": told.max_length, "template": told.template}
            choices = measure_choices(model, params, tokenizer, held_out.rows, **options)
            found[name] |= {"likelihood": choices.accuracy, "chance": choices.chance}
    return found


def on_other_tasks(tasks: Sequence[str], *, rows: int | None) -> Observe:
    """Returns an observer of trials that measures the tuned model on other tasks, see `measure_tasks`.

    Args:
        tasks: their names.
        rows: so many of the first test rows; None: all.
    """

    def other_tasks(tuned: Tuned) -> dict[str, Any]:
        return measure_tasks(
            *(tuned.model, tuned.params, tuned.job.tokenizer, tuned.job.config.rows),
            data_root=tuned.data_root,
            tasks=tasks,
            rows=rows,
            trained=tuned.trained,
        )

    # The name is part of a trial's key: trials that measured other tasks are others.
    other_tasks.__name__ = f"on_other_tasks {json.dumps([list(tasks), rows])}"
    return other_tasks
