"""A run whose weights are kept every few steps: the optimizer's path."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from experiments.layers import LINEAR_LAYERS
from experiments.runner.bench import Bench
from experiments.runner.training import config_of, encode_as_told, task_rows
from jaxsparse.data.batches import Batch, evaluation_batches
from jaxsparse.models.functional import LanguageModel
from jaxsparse.subspaces.targets import resolve_targets
from jaxsparse.train.prepare import prepare

__all__ = ["OptimizerPath", "follow"]


@dataclass(frozen=True)
class OptimizerPath:
    """Where an optimizer went.

    Attributes:
        model: the model's functions.
        points: `LINEAR_LAYERS` at several steps on the host, the first before any step and the last after all.
        params: the tuned parameters, factors merged.
        batches: training rows, which the landscape is of.
    """

    model: LanguageModel
    points: list[Any]
    params: Any
    batches: list[Batch]


def follow(bench: Bench, label: str, task: str) -> OptimizerPath:
    """Trains a method on a task by the settings, seed 0.

    Args:
        bench: the experiment's workplace.
        label: of the method.
        task: the task.

    Raises:
        InputError: something in the settings, the data or the model does not work.
    """
    trial, more = bench.trial(label, task), bench.settings.more
    rows = list(task_rows(bench.data_root, task).train)[: trial.rows]
    job = prepare(config_of(trial, bench.folder / "paths", bench.data_root), rows, [])
    points = [_layers(job.base.params)]
    state = job.tuner.init(job.base.params, donate=True)
    for step in range(1, job.steps + 1):
        state, _ = job.tuner.step(state, next(job.data))
        if step % more["path_every"] == 0 or step == job.steps:
            points.append(_layers(job.tuner.params(state)))
    held_out = encode_as_told(job.config.rows, job.model, job.tokenizer, rows[: more["rows"]])
    batches = evaluation_batches(held_out.examples, batch_size=more["rows_a_batch"], max_length=held_out.max_length)
    return OptimizerPath(job.model, points, job.tuner.params(state), list(batches))


def _layers(params: Any) -> Any:
    """A tree of the layers alone, on the host: steps take over the memory of what was before them."""
    leaves, treedef = jax.tree.flatten(params)
    kept = {target.position for target in resolve_targets(params, LINEAR_LAYERS)}
    return treedef.unflatten([np.array(leaf) if at in kept else optax.MaskedNode() for at, leaf in enumerate(leaves)])
