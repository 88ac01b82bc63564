"""A whole fine-tuning run: load, measure, train, measure again, save the delta and check it, report."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsparse import deltas
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.hosts import agreed, gathered, on_all, on_first
from jaxsparse.common.numbers import finite_or_none
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.common.progress import progress
from jaxsparse.data.rows import load_rows
from jaxsparse.engine.description import count_slots
from jaxsparse.engine.tuner import TunerState
from jaxsparse.evaluate.held_out import Measurement, measure
from jaxsparse.models.checkpoints import load
from jaxsparse.select.schedules import Progress
from jaxsparse.train.config import FinetuneConfig
from jaxsparse.train.loop import train
from jaxsparse.train.optimizer import learning_rate
from jaxsparse.train.prepare import Job, prepare
from jaxsparse.train.report import Report
from jaxsparse.train.reporter import Totals
from jaxsparse.train.run_folder import check_run_folder, flat_options, open_run_folder

__all__ = ["carry_out", "finetune"]


def finetune(config: FinetuneConfig) -> Report | None:
    """Runs a fine-tuning job and writes its results to the run's folder.

    Args:
        config: the run's configuration.

    Returns:
        The report, which lies in `report.json` too; None on all of several processes but the first, which writes.

    Raises:
        InputError: something in the configuration, the data or the model does not work.
    """
    rows = config.rows
    train_rows = on_all(lambda: load_rows(rows.data))
    eval_rows = on_all(lambda: load_rows(rows.eval_data) if rows.eval_data is not None else [])
    on_first(lambda: check_run_folder(config))
    return carry_out(prepare(config, train_rows, eval_rows))


def carry_out(job: Job) -> Report | None:
    """Runs a job that `prepare` made, once: the training takes over the memory of its parameters.

    Args:
        job: the job; its data files must lie where its configuration says.

    Returns:
        The report; None on all of several processes but the first.

    Raises:
        InputError: the run's folder cannot be used.
    """
    config, base = job.config, job.base
    on_first(lambda: open_run_folder(config))
    before = _measured(job, "before", base.params)
    rate = learning_rate(config.inner, job.steps)
    state, totals = train(
        job.tuner,
        base.params,
        job.data,
        config.run,
        job.steps,
        rate=rate,
        base_fingerprint=base.fingerprint,
        sharding=job.sharding,
    )
    tuned, method_progress = job.tuner.params(state), state.method.progress
    after = _measured(job, "after", tuned)
    state, tuned = gathered((state, tuned))
    slots = count_slots(job.method, tuned)

    def finish() -> Report:
        report = _report(job, before, after, slots, method_progress, totals, _save_delta(job, state, tuned))
        text = json.dumps(dataclasses.asdict(report), indent=2, allow_nan=False)
        atomic_write_text(config.run.out / "report.json", text + "\n")
        return report

    return on_first(finish)


def _measured(job: Job, when: str, params: Any) -> Measurement | None:
    """Measures on the held-out rows, and leaves every prediction in `predictions_{when}.json`."""
    if job.held_out is None:
        return None
    file, rows = job.config.run.out / f"predictions_{when}.json", job.held_out.rows
    known = _read_measurement(file, len(rows)) if when == "before" and job.config.run.resume else None
    if agreed(known is not None):
        return known
    with progress(f"measuring {when}", 2 * len(rows)) as advance:
        measured = measure(job.model, params, job.tokenizer, job.held_out, advance=lambda n: advance(n, ""))
    written = [
        {"instruction": row.instruction, "input": row.input, "answer": row.answer, "prediction": prediction}
        for row, prediction in zip(rows, measured.predictions, strict=True)
    ]
    found = {"loss": finite_or_none(measured.loss), "exact_match": measured.exact_match, "rows": written}
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    on_first(lambda: atomic_write_text(file, text + "\n"))
    return measured


def _read_measurement(file: Path, rows: int) -> Measurement | None:
    """What an earlier call of the same run measured; None where it has not, or the file is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        predictions = tuple(str(row["prediction"]) for row in found["rows"])
        loss = math.nan if found["loss"] is None else float(found["loss"])
        measured = Measurement(loss, float(found["exact_match"]), len(predictions), predictions)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return measured if measured.rows == rows else None


@dataclasses.dataclass(frozen=True)
class _SavedDelta:
    path: Path
    entries: int
    size: int
    bit_identical: bool


def _save_delta(job: Job, state: TunerState, tuned: Any) -> _SavedDelta:
    """Saves what changed, reads it back, and compares base + delta with the tuned model bit for bit."""
    config, base = job.config, job.base
    untouched = load(config.base.model, dtype=config.base.dtype)
    options = flat_options(config.chosen_method) | {"inner": config.inner.optimizer, "lr": config.inner.lr}
    about = {"base_name": base.name, "base_fingerprint": untouched.fingerprint}
    delta = job.tuner.delta(state, untouched.params, options=options, **about)
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
    job: Job,
    before: Measurement | None,
    after: Measurement | None,
    slots: int,
    method_progress: Progress,
    totals: Totals,
    delta: _SavedDelta,
) -> Report:
    retention = totals.retention_at_refresh
    return Report(
        loss_before=finite_or_none(before.loss) if before else None,
        loss_after=finite_or_none(after.loss) if after else None,
        exact_match_before=before.exact_match if before else None,
        exact_match_after=after.exact_match if after else None,
        eval_rows=after.rows if after else 0,
        entries_changed=delta.entries,
        slots=slots,
        delta_bytes=delta.size,
        bit_identical=delta.bit_identical,
        tokens_per_second=totals.tokens_per_second,
        retention_mean=finite_or_none(sum(retention) / len(retention)) if retention else None,
        refreshes=int(method_progress.refreshes),
        steps=job.steps,
        skipped=totals.skipped,
        method=job.config.method,
        engine=job.engine,
        base=job.config.base.model,
        delta=str(delta.path),
    )
