"""S²FT, table 4: by what score the trained heads and channels are picked."""

from pathlib import Path

from experiments.runner.bench import Bench
from experiments.runner.comparison import bars, compared, scores
from experiments.runner.experiment import Experiment

__all__ = ["EXPERIMENT"]


def run(bench: Bench) -> None:
    """Compares all scores, each with its largest and smallest, with random picks."""
    rows = bench.compare()
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    bars(bench, rows, "loss", "Held-out loss by score of the trained heads and channels", "nats a token")
    for label in ("A small", "S small"):
        verdict = compared(rows, label, "R")
        bench.report.finding(f"{label} does better than random", verdict.lower, verdict.said)
    for label in ("W large", "W small", "A large", "S large", "G large", "G small"):
        if label in bench.labels:
            verdict = compared(rows, label, "R")
            bench.report.finding(f"{label} does worse than random", verdict.higher, verdict.said)
    verdict = compared(rows, "A small", "A large")
    bench.report.finding("small activations do better than large ones", verdict.lower, verdict.said)
    bench.report.printed(EXPERIMENT.folder / "paper.csv", "table 4, LLaMA-3-8B, mean accuracy in %")


EXPERIMENT = Experiment(
    name="s2ft/selection",
    shows="S²FT, table 4",
    question="Which heads and channels are best trained: random ones, or those with the largest or smallest scores?",
    run=run,
    folder=Path(__file__).parent,
)
