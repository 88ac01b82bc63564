"""GASDU, table 3: how often the support is picked again."""

from pathlib import Path

from experiments.runner.bench import Bench
from experiments.runner.comparison import bars, compared, scores
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]


def run(bench: Bench) -> None:
    """Compares periods on every task, and says whether M = 50 does as well as M = 1 and better than a fixed mask."""
    rows = bench.compare()
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    bars(bench, rows, "loss", "Held-out loss by refresh period", "nats a token")
    verdict = compared(rows, "M=50", "M=1")
    bench.report.finding("M = 50 does as well as M = 1 (within noise or better)", verdict.not_higher, verdict.said)
    verdict = compared(rows, "M=50", "fixed mask")
    bench.report.finding("periodic refresh beats a fixed mask", verdict.lower, verdict.said)
    bench.report.printed(EXPERIMENT.folder / "paper.csv", "table 3, GPT-OSS-20B, exact match and accuracy in %")


EXPERIMENT = Experiment(
    name="gasdu/refresh_interval",
    shows="GASDU, table 3",
    question="How much is lost when the support is picked every M steps instead of every step, or only once?",
    run=run,
    folder=Path(__file__).parent,
)
