"""The paper's scale where it cannot run: every method's step compiled for the device that it wants."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.runner.bench import Bench
from experiments.runner.training import config_of
from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch
from jaxsparse.engine.description import count_slots
from jaxsparse.engine.fused import fuse
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.plan.steps import plan_step
from jaxsparse.train.optimizer import make_method

__all__ = ["plan_trials"]

_REMAT = "full"


def plan_trials(bench: Bench) -> None:
    """Compiles the step of every method of the settings, and reports what a run would take.

    A method that does not fit, or cannot be planned, is a line of the table that says why.
    """
    settings = bench.settings
    task = settings.tasks[0] if settings.tasks else "-"
    rows = []
    with progress(f"compiling for {settings.device}", len(settings.methods)) as advance:
        for label in settings.methods:
            try:
                rows.append({"method": label} | _planned(bench, label, task))
            except InputError as error:
                rows.append({"method": label, "problem": str(error)})
                bench.report.failure(f"{label} cannot be planned: {error}")
            advance(1, label)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    told = f"{settings.model} on {settings.device}, largest batch of the grid, {settings.max_length} tokens a row"
    bench.report.table(
        "plan", [{name: row.get(name) for name in columns} for row in rows], f"Planned, not run: {told}, {_REMAT} remat"
    )
    runs = len(settings.methods) * len(settings.tasks) * settings.seeds
    grid = len(settings.tasks) * sum(len(points) for label in settings.methods if len(points := bench.grid(label)) > 1)
    bench.report.text(
        f"A machine with the device runs it by the same command: {grid} trials of stage one and "
        f"{runs} of stage two, on {', '.join(settings.tasks)}."
    )
    reference = settings.engine == "reference"
    if reference:
        bench.report.text(
            "The experiment runs on the reference engine, which measures every step's retention and holds dense "
            "gradients for that; planned is the fused engine's step."
        )
    fitting = [row["method"] for row in rows if row.get("fits")]
    bench.report.finding(
        "the paper's model and hyper-parameters compile and fit",
        None if reference else len(fitting) == len(rows),
        f"{len(fitting)} of {len(rows)} methods on {settings.device}",
    )


def _planned(bench: Bench, label: str, task: str) -> dict[str, Any]:
    settings = bench.settings
    trial = bench.trial(label, task, batch=max(settings.batch))
    config = config_of(trial, bench.folder, bench.data_root)
    model = LanguageModel(load_config(trial.model), _REMAT)
    params = model.abstract(jnp.dtype(settings.dtype))
    method = make_method(config, params, 1000, model.config.head_dim)
    shape = trial.batch, settings.max_length
    whole: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    number: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    tuner = fuse(model.loss, method, has_aux=True)
    plan = plan_step(tuner, params, Batch(whole, whole, number, whole, whole), settings.device)
    return {
        "entries trained": count_slots(method, params),
        "peak memory, GB": plan.peak / 1e9,
        "weights, GB": plan.weights / 1e9,
        "optimizer, GB": plan.optimizer / 1e9,
        "fits": plan.fits,
        "step at least, ms": 1e3 * plan.seconds,
        "tokens/s at most": plan.tokens_per_second,
    }
