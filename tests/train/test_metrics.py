"""Metrics: one line of valid JSON a step, whatever happened to the step or to the file."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxsparse.data.batches import Batch
from jaxsparse.engine.tuner import StepMetrics
from jaxsparse.train.config import OptimizerConfig
from jaxsparse.train.metrics import MetricsWriter
from jaxsparse.train.optimizer import learning_rate
from jaxsparse.train.reporter import Reporter, Totals
from tests.train.runs import metrics_of


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "[2]", "null", '{"loss": 1}', "\0\0"])
def test_a_damaged_line_ends_what_is_kept(tmp_path: Path, damage: str) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    lines[1] = damage
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    with MetricsWriter(tmp_path, 3) as writer:
        writer.write(4, loss=float("nan"), speed=float("inf"), tokens=3)
    assert metrics_of(tmp_path) == [{"step": 1}, {"step": 4, "loss": None, "speed": None, "tokens": 3}]


def test_the_learning_rate_is_that_of_the_steps_taken(tmp_path: Path) -> None:
    """A skipped step does not move the schedule, so the next step uses the same rate."""
    rate = learning_rate(OptimizerConfig(lr=1.0, schedule="linear"), steps=4)
    batch = Batch(*(np.ones((1, 2), dtype) for dtype in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    with MetricsWriter(tmp_path) as writer:
        reporter = Reporter(writer, Totals(), rate, lambda count, text: None)
        for number, skipped in enumerate((1, 1, 2, 2), start=1):
            values = np.float32([1.0, 2.0, 0.5, 0.5])
            metrics = StepMetrics(*values, refreshed=np.bool_(False), skipped=np.int32(skipped))
            reporter.step(number, batch, lambda metrics=metrics: metrics)
        reporter.flush()
    assert [line["learning_rate"] for line in metrics_of(tmp_path)] == [1.0, 1.0, 0.75, 0.75]
