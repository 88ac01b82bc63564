"""Measures parameters that no trial holds, such as the base's or those of mixed adapters, as trials measure theirs."""

from typing import Any

from experiments.runner.bench import Bench
from experiments.runner.training import parts_of, task_rows
from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.held_out import HeldOut, Measurement, encode_held_out, measure
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel

__all__ = ["Judge"]


class Judge:
    """Measures parameters of an experiment's model on rows of its tasks.

    Args:
        bench: the experiment's workplace.

    Attributes:
        base: the model's parameters as they were before any tuning.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        base = load(bench.settings.model, dtype=bench.settings.dtype)
        if base.tokenizer is None:
            raise InputError(f"model {base.name} has no tokenizer; add its tokenizer.json to {base.folder}")
        self.base, self._tokenizer, self._model = base.params, base.tokenizer, LanguageModel(base.config)
        self._encoded: dict[tuple[str, str], HeldOut] = {}

    def __call__(self, params: Any, task: str, part: str = "test") -> Measurement:
        """Loss and exact match on a task.

        Args:
            params: the parameters.
            task: its name.
            part: "test", or "dev": rows that no trial trains on, and nothing is reported of.
        """
        if (task, part) not in self._encoded:
            self._encoded[task, part] = self._rows(task, part)
        return measure(self._model, params, self._tokenizer, self._encoded[task, part])

    def _rows(self, task: str, part: str) -> HeldOut:
        told = self._bench.settings
        rows = parts_of(task_rows(self._bench.data_root, task, told.train_from), told.train_from)
        chosen = rows["test"][: told.test_rows] if part == "test" else rows["dev"][: told.dev_rows]
        return encode_held_out(
            self._model,
            self._tokenizer,
            chosen,
            max_length=told.max_length,
            max_new_tokens=told.max_new_tokens,
            train_on=told.train_on,
            too_long="drop",
        )
