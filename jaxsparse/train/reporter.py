"""What a run tells about its steps, one step late so that the device never waits for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxsparse.common.progress import Advance
from jaxsparse.data.batches import Batch
from jaxsparse.engine.tuner import StepMetrics
from jaxsparse.train.metrics import MetricsWriter, NoMetrics

__all__ = ["Reporter", "Totals"]


@dataclass
class Totals:
    """Sums over a run; part of its checkpoints.

    Attributes:
        tokens: input tokens of the timed steps, padding left out.
        seconds: time of the timed steps: all but those that compiled.
        retention_at_refresh: the retention of every refreshing step on which it was measured.
        skipped: steps left out because of a gradient that was not finite.
    """

    tokens: int = 0
    seconds: float = 0.0
    retention_at_refresh: list[float] = field(default_factory=list)
    skipped: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Input tokens per second of the timed steps; 0 if every step compiled."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the device."""

    step: int
    tokens: int
    metrics: StepMetrics
    timed: bool


class Reporter:
    """Writes metrics and progress of every step, and sums them up.

    Metrics of a step are fetched while the next one runs. A batch of a new shape compiles, so its step is not timed.

    Args:
        writer: takes the metrics.
        totals: are added to.
        rate: learning rate as a function of the optimizer's step, from 0.
        advance: takes the progress.
    """

    def __init__(
        self, writer: MetricsWriter | NoMetrics, totals: Totals, rate: Callable[[int], Any], advance: Advance
    ) -> None:
        self._writer, self._totals, self._rate, self._advance = writer, totals, rate, advance
        self._pending: _Pending | None = None
        self._shapes: set[tuple[int, ...]] = set()
        self._mark = time.perf_counter()

    def step(self, number: int, batch: Batch, take: Callable[[], StepMetrics]) -> None:
        """Takes a step and reports the one before it.

        Args:
            number: of the step, from 1.
            batch: its batch.
            take: takes the step and returns its metrics, still on the device.
        """
        compiles = batch.tokens.shape not in self._shapes
        if compiles:
            self.flush()
            self._shapes.add(batch.tokens.shape)
        metrics = take()
        if not compiles:
            self.flush()
        self._pending = _Pending(number, int((batch.segments > 0).sum()), metrics, timed=not compiles)
        if compiles:
            self.flush()

    def flush(self) -> None:
        """Waits for the last step and reports it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = jax.device_get(pending.metrics)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        if pending.timed:
            self._totals.tokens += pending.tokens
            self._totals.seconds += seconds
        if values.refreshed and np.isfinite(values.retention):
            self._totals.retention_at_refresh.append(float(values.retention))
        # A skipped step does not count for the optimizer, nor for the schedule inside it.
        rate = float(self._rate(pending.step - 1 - self._totals.skipped))
        self._totals.skipped = int(values.skipped)
        self._write(pending, values, rate, seconds)

    def restart(self) -> None:
        """Leaves out the time since the last step, which went into something else."""
        self._mark = time.perf_counter()

    def _write(self, pending: _Pending, values: StepMetrics, rate: float, seconds: float) -> None:
        speed = pending.tokens / seconds
        self._writer.write(
            pending.step,
            loss=float(values.loss),
            learning_rate=rate,
            retention=float(values.retention),
            retention_mean=float(values.retention_mean),
            refreshed=int(values.refreshed),
            skipped=int(values.skipped),
            tokens=pending.tokens,
            seconds=round(seconds, 4),
        )
        retention = f"  retention {values.retention:.2f}" if np.isfinite(values.retention) else ""
        self._advance(1, f"loss {values.loss:.3f}{retention}  {speed:,.0f} tokens/s")
