"""A run whose weights are kept every few steps: the optimizer's path."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

import jaxsparse as js
from experiments.runner.bench import Bench
from experiments.runner.training import config_of
from jaxsparse.data.batches import Batch, evaluation_batches
from jaxsparse.evaluate.held_out import encode_held_out
from jaxsparse.evaluate.suites import load_task
from jaxsparse.models.functional import LanguageModel
from jaxsparse.subspaces.targets import resolve_targets
from jaxsparse.train.prepare import prepare

__all__ = ["LAYERS", "OptimizerPath", "follow"]

LAYERS = [
    js.Target(r"layers/self_attn/._proj/kernel", stack_axes=(0,)),
    js.Target(r"layers/mlp/.*_proj/kernel", stack_axes=(0,)),
]
"""The weights that directions move: all linear layers, the same for every method. Full fine-tuning's other weights
stay as they are in the end."""


@dataclass(frozen=True)
class OptimizerPath:
    """Where an optimizer went.

    Attributes:
        model: the model's functions.
        points: weights of `LAYERS` at several steps on the host, the first before any step and the last after all.
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
    rows = list(load_task(bench.data_root, task).train)[: trial.rows]
    job = prepare(config_of(trial, bench.folder / "paths", bench.data_root), rows, [])
    points = [_layers(job.base.params)]
    state = job.tuner.init(job.base.params, donate=True)
    for step in range(1, job.steps + 1):
        state, _ = job.tuner.step(state, next(job.data))
        if step % more["path_every"] == 0 or step == job.steps:
            points.append(_layers(job.tuner.params(state)))
    told = job.config.rows
    held_out = encode_held_out(
        job.model,
        job.tokenizer,
        rows[: more["rows"]],
        max_length=told.max_length,
        max_new_tokens=told.max_new_tokens,
        template=told.template,
        too_long="drop",
    )
    batches = evaluation_batches(held_out.examples, batch_size=more["rows_a_batch"], max_length=held_out.max_length)
    return OptimizerPath(job.model, points, job.tuner.params(state), list(batches))


def _layers(params: Any) -> Any:
    """A tree of the layers alone, on the host: steps take over the memory of what was before them."""
    leaves, treedef = jax.tree.flatten(params)
    kept = {target.position for target in resolve_targets(params, LAYERS)}
    return treedef.unflatten([np.array(leaf) if at in kept else optax.MaskedNode() for at, leaf in enumerate(leaves)])
