"""What Beyond LoRA's experiments find out about a tuned model: one function for all, so that they share trials."""

from typing import Any

import numpy as np

from experiments.runner.training import Tuned, encode_as_told
from jaxsparse.analysis import generalisation_gap, intruder_dimensions
from jaxsparse.analysis.intruders import Intruders
from jaxsparse.data.batches import evaluation_batches
from jaxsparse.data.rows import Row
from jaxsparse.evaluate.compiled import batch_loss

__all__ = ["gap_and_intruders", "row_losses", "trained_rows"]

_ROWS = 128
"""So many of the first training rows and of the first test rows are measured."""
_LEADING = 10
"""Shuttleworth et al. look at so many of a tuned matrix's singular vectors, Beyond LoRA at all."""


def trained_rows(tuned: Tuned) -> list[Row]:
    """The first rows of those that a model was trained on."""
    return tuned.trained[:_ROWS]


def row_losses(tuned: Tuned, rows: list[Row]) -> np.ndarray:
    """Loss of every row's answer, in nats a token; shape (rows,)."""
    held_out = encode_as_told(tuned.job.config.rows, tuned.model, tuned.job.tokenizer, rows)
    # A row a batch: the model's loss is one number a batch.
    singles = evaluation_batches(held_out.examples, batch_size=1, max_length=held_out.max_length)
    return np.array([float(batch_loss(tuned.model, tuned.params, single)[0]) for single in singles])


def gap_and_intruders(tuned: Tuned) -> dict[str, Any]:
    """Generalisation gap with its interval over rows, and mean intruder dimensions of a matrix by threshold."""
    gap = generalisation_gap(
        row_losses(tuned, trained_rows(tuned)), row_losses(tuned, list(tuned.task.test[:_ROWS])), resamples=1000
    )
    found = intruder_dimensions(tuned.base().params, tuned.params, top=None)
    leading = Intruders(found.thresholds, {path: each[:, :_LEADING] for path, each in found.similarity.items()})
    return {
        **vars(gap),
        "thresholds": list(found.thresholds),
        "intruders": found.mean.tolist(),
        "leading_intruders": leading.mean.tolist(),
    }
