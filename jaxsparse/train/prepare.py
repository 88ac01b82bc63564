"""Everything about a run that can be wrong, found before anything is written."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
from jax.sharding import AxisType
from rich.console import Console

from jaxsparse.common.errors import InputError
from jaxsparse.common.hosts import placed
from jaxsparse.data.batches import batches, steps_per_epoch
from jaxsparse.data.examples import Example, encode_rows
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.engine.description import SubspaceTransformation, count_slots
from jaxsparse.engine.sharding import Sharding, row_parts
from jaxsparse.engine.tuner import Tuner
from jaxsparse.evaluate.held_out import HeldOut, encode_held_out
from jaxsparse.models.checkpoints import Checkpoint, load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.sharding import mesh_sizes, partition_spec
from jaxsparse.train.config import DataConfig, Engine, FinetuneConfig, RunConfig
from jaxsparse.train.engines import choose_engine
from jaxsparse.train.metrics import check_tensorboard
from jaxsparse.train.optimizer import make_method

__all__ = ["Job", "prepare"]


@dataclass(frozen=True)
class Job:
    """A run that is ready to start.

    Attributes:
        config: its configuration.
        base: the model to start from.
        tokenizer: its tokenizer.
        model: the model's functions.
        method: what trains it.
        tuner: makes the steps.
        engine: which engine the tuner is of.
        data: the training batches.
        steps: optimizer steps of the whole run.
        held_out: the rows to measure on, or None.
        sharding: how the model is divided between devices, or None.
    """

    config: FinetuneConfig
    base: Checkpoint
    tokenizer: Tokenizer
    model: LanguageModel
    method: SubspaceTransformation
    tuner: Tuner
    engine: Engine
    data: grain.DatasetIterator
    steps: int
    held_out: HeldOut | None
    sharding: Sharding | None = None


def prepare(config: FinetuneConfig, train_rows: Sequence[Row], eval_rows: Sequence[Row]) -> Job:
    """Checks a configuration, loads the model and encodes the rows. Writes nothing.

    Args:
        config: the run's configuration.
        train_rows: the rows to train on.
        eval_rows: the held-out rows, of which `config.rows.eval_rows` are taken; may be empty.

    Returns:
        The job.

    Raises:
        InputError: something in the configuration, the data or the model does not work.
    """
    rows, run = config.rows, config.run
    _check_run(run)
    _check_rows(rows)
    sharding = _sharding(config)
    base = load(config.base.model, dtype=config.base.dtype)
    if base.tokenizer is None:
        raise InputError(f"model {base.name} has no tokenizer; add its tokenizer.json to {base.folder}")
    tokenizer, longest = base.tokenizer, base.config.max_position_embeddings
    if rows.max_length > longest:
        raise InputError(f"max_length={rows.max_length} is more than the {longest} positions of the model")
    options: dict[str, Any] = {"template": rows.template, "max_length": rows.max_length, "too_long": rows.too_long}
    examples = encode_rows(train_rows, tokenizer, train_on=rows.train_on, **options)
    steps = _steps(config, examples)
    method = make_method(config, base.params, steps, base.config.head_dim)
    if sharding is not None:
        base = dataclasses.replace(base, params=jax.tree.map(placed, base.params, sharding.of(base.params)))
    model, held_out = LanguageModel(base.config, config.base.remat, row_parts=row_parts(sharding)), None
    count_slots(method, base.params)  # complains about targets and budgets
    if eval_rows:
        measured = eval_rows[: rows.eval_rows]
        held_out = encode_held_out(
            model, tokenizer, measured, max_new_tokens=rows.max_new_tokens, train_on=rows.train_on, **options
        )
    batching = {"seed": run.seed, **_batching(rows)}
    tuner, engine, notice = choose_engine(
        config.engine,
        model.loss,
        base.params,
        method,
        lambda: batches(examples, **batching),
        share_of_data=max(1, round(0.01 * steps_per_epoch(examples, epoch=0, **batching))),  # S2FT's paper takes 1 %
        micro_batches=rows.micro_batches,
        sharding=sharding,
    )
    if notice:
        Console(stderr=True, soft_wrap=True).print(notice, markup=False, highlight=False)
    data = batches(examples, **batching)
    return Job(config, base, tokenizer, model, method, tuner, engine, data, steps, held_out, sharding)


def _sharding(config: FinetuneConfig) -> Sharding | None:
    """How the model is divided between the devices that are here."""
    if config.base.mesh is None:
        if jax.process_count() > 1:
            raise InputError(f"several processes need a mesh of all their devices: --mesh data={jax.device_count()}")
        return None
    sizes = mesh_sizes(config.base.mesh, jax.device_count())
    parts, rows = sizes["data"] * sizes["fsdp"], config.rows.batch // config.rows.micro_batches
    if rows % parts:
        raise InputError(
            f"batch={config.rows.batch} in micro_batches={config.rows.micro_batches} leaves {rows} rows, which the "
            f"{parts} devices along data and fsdp cannot share equally"
        )
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Sharding(mesh, partition_spec, selection=config.base.selection)


def _check_run(run: RunConfig) -> None:
    if run.steps is not None and run.epochs is not None:
        raise InputError(f"give steps or epochs, not both: steps={run.steps}, epochs={run.epochs}")
    _check_at_least_1(run, "steps", "checkpoint_every", "keep_checkpoints")
    if run.epochs is not None and not 0 < run.epochs < math.inf:
        raise InputError(f"epochs must be a positive number, got {run.epochs}")
    if run.checkpoint_minutes is not None and not 0 < run.checkpoint_minutes < math.inf:
        raise InputError(
            f"checkpoint_minutes must be a positive number, or None for no checkpoints by time, "
            f"got {run.checkpoint_minutes}"
        )
    if run.tensorboard:
        check_tensorboard()


def _check_rows(rows: DataConfig) -> None:
    _check_at_least_1(rows, "batch", "eval_rows")
    if rows.micro_batches < 1 or rows.batch % rows.micro_batches:
        raise InputError(f"micro_batches={rows.micro_batches} must divide batch={rows.batch}")


def _check_at_least_1(options: RunConfig | DataConfig, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _batching(rows: DataConfig) -> dict[str, Any]:
    return {"batch_size": rows.batch, "max_length": rows.max_length, "mode": rows.batching}


def _steps(config: FinetuneConfig, examples: Sequence[Example]) -> int:
    """Optimizer steps of the run, from steps or epochs."""
    if config.run.steps is not None:
        return config.run.steps
    epochs = 3 if config.run.epochs is None else config.run.epochs
    lengths = (
        min(epochs - epoch, 1) * steps_per_epoch(examples, seed=config.run.seed, epoch=epoch, **_batching(config.rows))
        for epoch in range(math.ceil(epochs))
    )
    return math.ceil(sum(lengths))
