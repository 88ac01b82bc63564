"""Full fine-tuning, watched at every step: losses and squared gradient norms."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
import optax

from experiments.runner.bench import Bench
from experiments.runner.training import config_of, encode_as_told, task_rows
from experiments.runner.trials import Trial
from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch, evaluation_batches
from jaxsparse.data.rows import Row
from jaxsparse.train.optimizer import inner_optimizer
from jaxsparse.train.prepare import Job, prepare

__all__ = ["Trajectory", "watch"]


@dataclass(frozen=True)
class Trajectory:
    """What was seen before every step; losses in nats a token, gradients of all parameters.

    Attributes:
        held_out_losses: of held-out rows (f of figure 3); shape (steps,).
        batch_norms: squared norm of the gradient of the step's batch (figure 3); shape (steps,).
        fixed_losses: of some fixed training rows; shape (steps,).
        fixed_norms: squared norm of the gradient of that very loss; shape (steps,).
    """

    held_out_losses: np.ndarray
    batch_norms: np.ndarray
    fixed_losses: np.ndarray
    fixed_norms: np.ndarray


def watch(bench: Bench, label: str, task: str, seed: int) -> Trajectory | None:
    """Trains all parameters by the settings with plain optax, unless that was done before.

    Args:
        bench: the experiment's workplace; `more` says how many rows are watched.
        label: of the settings' method, which gives the rate.
        task: the task.
        seed: of the order of the rows.

    Returns:
        What was seen; None where something went wrong, which the trial's line tells.
    """
    watched = {name: bench.settings.more[name] for name in ("held_out_rows", "fixed_rows")}
    trial = bench.trial(label, task, seed, observed=f"watched {json.dumps(watched)}")
    row = bench.run(trial, work=lambda trial: _watched(bench, trial))
    if "error" in row:
        return None
    return Trajectory(**{name: np.array(values) for name, values in row["trajectory"].items()})


def _watched(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Trains; returns the last held-out loss, and the trajectory as JSON holds it."""
    rows = task_rows(bench.data_root, trial.task)
    job = prepare(config_of(trial, bench.folder / "watched", bench.data_root), list(rows.train)[: trial.rows], [])
    held_out = _batch(bench, job, (rows.dev or rows.test)[: bench.settings.more["held_out_rows"]])
    fixed = _batch(bench, job, rows.train[: bench.settings.more["fixed_rows"]])
    optimizer = inner_optimizer(job.config.inner, job.steps)

    def gradient(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
        (loss, _), gradients = jax.value_and_grad(job.model.loss, has_aux=True)(params, batch)
        return loss, gradients

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, tuple[jax.Array, ...]]:
        fixed_loss, fixed_gradient = gradient(params, fixed)
        _, gradients = gradient(params, batch)
        seen = (
            job.model.loss(params, held_out)[0],
            optax.tree.norm(gradients, squared=True),
            fixed_loss,
            optax.tree.norm(fixed_gradient, squared=True),
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, seen

    params = job.base.params
    state, found = optimizer.init(params), []
    with progress(f"full fine-tuning on {trial.task}, seed {trial.seed}", job.steps) as advance:
        for number in range(job.steps):
            params, state, seen = step(params, state, next(job.data))
            found.append([float(each) for each in seen])
            advance(1, f"held-out loss {found[-1][0]:.3f}" if number % 10 == 0 else "")
    columns = np.array(found).T
    if not np.isfinite(columns).all():
        raise InputError(f"diverged with lr={trial.lr}")
    return {"loss": found[-1][0], "trajectory": asdict(Trajectory(*columns.tolist()))}


def _batch(bench: Bench, job: Job, rows: Sequence[Row]) -> Batch:
    """Rows as one batch."""
    encoded = encode_as_told(job.config.rows, job.model, job.tokenizer, rows)
    return next(evaluation_batches(encoded.examples, batch_size=len(encoded.rows), max_length=encoded.max_length))
