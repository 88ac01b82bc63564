"""GASDU, tables 1 and 2: methods on tasks, at one budget."""

from pathlib import Path

from experiments.runner.bench import Bench
from experiments.runner.comparison import bars, compared, scores
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]


def run(bench: Bench) -> None:
    """Searches rate and batch for every method and task, then compares the medians over seeds."""
    rows = bench.compare()
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    bars(bench, rows, "loss", "Held-out loss at one budget", "nats a token")
    for other in bench.labels:
        if other not in ("gasdu", "full"):
            verdict = compared(rows, "gasdu", other)
            bench.report.finding(f"GASDU does better than {other} at the same budget", verdict.lower, verdict.said)
    verdict = compared(rows, "gasdu", "full")
    bench.report.finding("GASDU comes close to full fine-tuning", verdict.not_higher, verdict.said)
    bench.report.printed(EXPERIMENT.folder / "paper.csv", "tables 1 and 2, exact match and accuracy in %")


EXPERIMENT = Experiment(
    name="gasdu/tasks",
    shows="GASDU, tables 1 and 2",
    question="At 0.01 % of the parameters, which method tunes best, and how far is it from full fine-tuning?",
    run=run,
    folder=Path(__file__).parent,
)
