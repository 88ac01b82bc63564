"""Everything about a run that can be wrong, found before anything is written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax

from jaxsparse.common.errors import InputError
from jaxsparse.data.batches import batches, steps_per_epoch
from jaxsparse.data.examples import Example, encode_rows
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.engine.calibration import calibrate, with_support
from jaxsparse.engine.description import Description, SubspaceTransformation
from jaxsparse.evaluate.held_out import HeldOut, encode_held_out
from jaxsparse.models.checkpoints import Checkpoint, load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.config import DataConfig, FinetuneConfig, RunConfig
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
        data: the training batches.
        steps: optimizer steps of the whole run.
        held_out: the rows to measure on, or None.
    """

    config: FinetuneConfig
    base: Checkpoint
    tokenizer: Tokenizer
    model: LanguageModel
    method: SubspaceTransformation
    data: grain.DatasetIterator
    steps: int
    held_out: HeldOut | None


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
    base = load(config.base.model, dtype=config.base.dtype)
    if base.tokenizer is None:
        raise InputError(f"model {base.name} has no tokenizer; add its tokenizer.json to {base.folder}")
    longest = base.config.max_position_embeddings
    if rows.max_length > longest:
        raise InputError(f"max_length={rows.max_length} is more than the {longest} positions of the model")
    options: dict[str, Any] = {"template": rows.template, "max_length": rows.max_length, "too_long": rows.too_long}
    examples = encode_rows(train_rows, base.tokenizer, train_on=rows.train_on, **options)
    steps = _steps(config, examples)
    method = make_method(config, base.params, steps, base.config.head_dim)
    model, held_out = LanguageModel(base.config, config.base.remat), None
    method = _calibrated(method, model, base.params, config, examples)
    jax.eval_shape(method.init, base.params)  # complains about targets and budgets
    if eval_rows:
        measured = eval_rows[: rows.eval_rows]
        held_out = encode_held_out(model, base.tokenizer, measured, max_new_tokens=rows.max_new_tokens, **options)
    data = batches(examples, seed=run.seed, **_batching(rows))
    return Job(config, base, base.tokenizer, model, method, data, steps, held_out)


def _calibrated(
    method: SubspaceTransformation,
    model: LanguageModel,
    params: Any,
    config: FinetuneConfig,
    examples: Sequence[Example],
) -> SubspaceTransformation:
    """The method, with its support picked by activations if it wants them: over 1 % of the data, as S2FT's paper."""
    description = method.description
    if not isinstance(description, Description) or "activation" not in description.score.needs:
        return method
    batching = {"seed": config.run.seed, **_batching(config.rows)}
    data, steps = batches(examples, **batching), steps_per_epoch(examples, epoch=0, **batching)
    calibration_set = [next(data) for _ in range(max(1, round(0.01 * steps)))]
    return with_support(method, calibrate(model.loss, params, calibration_set, method))


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
