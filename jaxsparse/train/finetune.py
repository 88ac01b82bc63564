"""A whole fine-tuning run: load, measure, train, measure again, save the delta and check it, report."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsparse import deltas
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import batches, steps_per_epoch
from jaxsparse.data.examples import Example, encode_rows
from jaxsparse.data.rows import Row, load_rows
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.engine.tuner import ReferenceTuner, TunerState
from jaxsparse.evaluate.held_out import Measurement, measure
from jaxsparse.models.checkpoints import Checkpoint, load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.config import DataConfig, FinetuneConfig
from jaxsparse.train.loop import train
from jaxsparse.train.optimizer import learning_rate, make_method
from jaxsparse.train.report import Report
from jaxsparse.train.reporter import Totals
from jaxsparse.train.run_folder import flat_options, open_run_folder

__all__ = ["finetune"]


def finetune(config: FinetuneConfig) -> Report:
    """Runs a fine-tuning job and writes its results to the run's folder.

    Args:
        config: the run's configuration.

    Returns:
        The report, which lies in `report.json` too.

    Raises:
        InputError: something in the configuration, the data or the model does not work.
    """
    rows, run = config.rows, config.run
    train_rows = load_rows(rows.data)
    eval_rows = load_rows(rows.eval_data)[: rows.eval_rows] if rows.eval_data is not None else []
    base = load(config.base.model, dtype=config.base.dtype)
    tokenizer = _tokenizer(base)
    model = LanguageModel(base.config, config.base.remat)
    _check_batch(rows, model)
    examples = encode_rows(train_rows, tokenizer, rows.template, rows.max_length, train_on=rows.train_on)
    steps = _steps(config, examples)
    method = make_method(config, base.params, steps)
    jax.eval_shape(method.init, base.params)  # complains about targets and budgets before any work is done
    data = batches(examples, seed=run.seed, **_batching(rows))
    open_run_folder(config)

    before = _measured(config, "before", model, base.params, tokenizer, eval_rows)
    tuner = ReferenceTuner(model.loss, method, accumulate=rows.micro_batches)
    params, base = base.params, dataclasses.replace(base, params={})  # the training takes over their memory
    state, totals = train(
        tuner, params, data, run, steps, rate=learning_rate(config.inner, steps), base_fingerprint=base.fingerprint
    )
    after = _measured(config, "after", model, state.params, tokenizer, eval_rows)
    delta = _save_delta(config, base, state.params, steps)
    report = _report(config, before, after, state, totals, delta, steps)
    atomic_write_text(run.out / "report.json", json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return report


def _tokenizer(base: Checkpoint) -> Tokenizer:
    if base.tokenizer is None:
        raise InputError(f"model {base.name} has no tokenizer; add its tokenizer.json to {base.folder}")
    return base.tokenizer


def _check_batch(rows: DataConfig, model: LanguageModel) -> None:
    longest = model.config.max_position_embeddings
    if rows.max_length > longest:
        raise InputError(f"max_length={rows.max_length} is more than the {longest} positions of the model")
    if rows.micro_batches < 1 or rows.batch % rows.micro_batches:
        raise InputError(f"micro_batches={rows.micro_batches} must divide batch={rows.batch}")
    if rows.eval_rows is not None and rows.eval_rows < 1:
        raise InputError(f"eval_rows must be at least 1, got {rows.eval_rows}")


def _batching(rows: DataConfig) -> dict[str, Any]:
    return {"batch_size": rows.batch, "max_length": rows.max_length, "mode": rows.batching}


def _steps(config: FinetuneConfig, examples: Sequence[Example]) -> int:
    """Optimizer steps of the run, from steps or epochs."""
    steps, epochs = config.run.steps, config.run.epochs
    if steps is not None and epochs is not None:
        raise InputError(f"give steps or epochs, not both: steps={steps}, epochs={epochs}")
    name, value = ("steps", steps) if steps is not None else ("epochs", 3 if epochs is None else epochs)
    if not value > 0:
        raise InputError(f"{name} must be positive, got {value}")
    if steps is not None:
        return steps
    lengths = (
        min(value - epoch, 1) * steps_per_epoch(examples, seed=config.run.seed, epoch=epoch, **_batching(config.rows))
        for epoch in range(math.ceil(value))
    )
    return math.ceil(sum(lengths))


def _measured(
    config: FinetuneConfig, when: str, model: LanguageModel, params: Any, tokenizer: Tokenizer, rows: list[Row]
) -> Measurement | None:
    """Measures on the held-out rows, and leaves every prediction in `predictions_{when}.json`."""
    if not rows:
        return None
    file = config.run.out / f"predictions_{when}.json"
    if when == "before" and config.run.resume and file.exists():
        found = json.loads(file.read_text())
        predictions = tuple(row["prediction"] for row in found["rows"])
        return Measurement(found["loss"], found["exact_match"], len(predictions), predictions)
    with progress(f"measuring {when}", 2 * len(rows)) as advance:
        options = {"max_length": config.rows.max_length, "max_new_tokens": config.rows.max_new_tokens}
        measured = measure(
            model, params, tokenizer, rows, template=config.rows.template, advance=lambda n: advance(n, ""), **options
        )
    written = [
        {"instruction": row.instruction, "input": row.input, "answer": row.answer, "prediction": prediction}
        for row, prediction in zip(rows, measured.predictions, strict=True)
    ]
    found = {"loss": measured.loss, "exact_match": measured.exact_match, "rows": written}
    atomic_write_text(file, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return measured


@dataclasses.dataclass(frozen=True)
class _SavedDelta:
    path: Path
    entries: int
    size: int
    bit_identical: bool


def _save_delta(config: FinetuneConfig, base: Checkpoint, tuned: Any, steps: int) -> _SavedDelta:
    """Saves what changed, reads it back, and compares base + delta with the tuned model bit for bit."""
    untouched = load(config.base.model, dtype=config.base.dtype)
    options = flat_options(config.chosen_method) | {"inner": config.inner.optimizer, "lr": config.inner.lr}
    delta = deltas.diff(
        untouched.params,
        tuned,
        method=config.method,
        options=options,
        base_name=base.name,
        base_fingerprint=untouched.fingerprint,
        step=steps,
    )
    path = config.run.out / "delta"
    deltas.save(path, delta, overwrite=True)
    again = deltas.load(path, base_fingerprint=untouched.fingerprint)
    applied = deltas.apply(untouched.params, again, donate=True)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return _SavedDelta(path, delta.entries, size, _same_bits(applied, tuned))


def _same_bits(one: Any, other: Any) -> bool:
    pairs = zip(flatten_with_paths(one)[0], flatten_with_paths(other)[0], strict=True)
    return all(path == other_path and _bits_equal(a, b) for (path, a), (other_path, b) in pairs)


def _bits_equal(one: jax.Array, other: jax.Array) -> bool:
    first, second = np.asarray(one), np.asarray(other)
    return first.dtype == second.dtype and np.array_equal(first.view(np.uint8), second.view(np.uint8))


def _report(
    config: FinetuneConfig,
    before: Measurement | None,
    after: Measurement | None,
    state: TunerState,
    totals: Totals,
    delta: _SavedDelta,
    steps: int,
) -> Report:
    retention = totals.retention_at_refresh
    return Report(
        loss_before=before.loss if before else None,
        loss_after=after.loss if after else None,
        exact_match_before=before.exact_match if before else None,
        exact_match_after=after.exact_match if after else None,
        eval_rows=after.rows if after else 0,
        entries_changed=delta.entries,
        slots=sum(leaf.size for leaf in jax.tree.leaves(state.method.support)),
        delta_bytes=delta.size,
        bit_identical=delta.bit_identical,
        tokens_per_second=totals.tokens_per_second,
        retention_mean=sum(retention) / len(retention) if retention else 1.0,
        refreshes=int(state.method.progress.refreshes),
        steps=steps,
        skipped=totals.skipped,
        method=config.method,
        base=config.base.model,
        delta=str(delta.path),
    )
