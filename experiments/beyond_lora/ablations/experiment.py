"""Beyond LoRA, tables 8, 10 and 12, and figure 6: rank, scaling factor, and how often a chain starts again."""

from pathlib import Path
from typing import Any

from experiments.beyond_lora.observed import gap_and_intruders
from experiments.runner.bench import Bench
from experiments.runner.comparison import Verdict, compared, loss_curve, scores
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels

__all__ = ["EXPERIMENT"]

Curves = dict[str, dict[str, dict[str, float]]]
"""By what varies, by curve, from a method's label to its place."""


def run(bench: Bench) -> None:
    """Draws held-out loss over each of the three; those trials that beyond_lora/tasks has are shared with it."""
    rows = bench.compare(gap_and_intruders)
    curves: Curves = bench.settings.more["panels"]
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    _draw(bench, rows, curves)
    rank, scale, chains = curves.values()
    ranks = list(rank["cla"])
    verdict = compared(rows, ranks[-1], ranks[0])
    bench.report.finding("a higher rank does better under cla", verdict.lower, verdict.said)
    _closing(bench, rows, rank)
    usual = next(label for label, place in scale["cla"].items() if place == 2)
    for label in scale["cla"]:
        if label != usual:
            verdict = compared(rows, usual, label)
            bench.report.finding(f"α = 2r does no worse than {label}", verdict.not_higher, verdict.said)
    labels = [label for label in chains["c3la"] if label.startswith("c3la")]
    verdict = _best_and_worst(rows, labels)
    claim = "how often a chain starts again has no clear effect (the best number of chains against the worst)"
    bench.report.finding(claim, None if verdict.lower is None else not verdict.lower, verdict.said)
    folder = EXPERIMENT.folder
    bench.report.printed(folder / "paper_rank.csv", "table 8, DeBERTa v3 on MRPC, accuracy in % by learning rate")
    bench.report.printed(folder / "paper_alpha.csv", "table 10, DeBERTa v3 on MRPC, accuracy in % by α")
    bench.report.printed(folder / "paper_chains.csv", "table 12, DeBERTa v3, accuracy in % by chain reset frequency")


def _draw(bench: Bench, rows: list[dict[str, Any]], curves: Curves) -> None:
    tasks = bench.settings.tasks
    figure, drawn = panels(len(curves), len(tasks), title="Held-out loss by rank, scaling factor and chains")
    data = []
    for line, task in zip(drawn, tasks, strict=True):
        for panel, (varied, of_curve) in zip(line, curves.items(), strict=True):
            for name, places in of_curve.items():
                curve = loss_curve(panel, bench, rows, task=task, name=name, places=places)
                data += [{"varied": varied} | each for each in curve]
            panel.set(title=task, xlabel=varied, ylabel="held-out loss, nats a token", xscale="log")
            at = sorted({place for places in of_curve.values() for place in places.values()})
            panel.set_xticks(at, [f"{each:g}" for each in at])
            panel.minorticks_off()
            panel.legend()
    caption = f"Held-out loss, median and range of {len(bench.seeds)} seeds; one chain is cla"
    bench.report.picture("ablations", figure, data, caption)


def _closing(bench: Bench, rows: list[dict[str, Any]], rank: dict[str, dict[str, float]]) -> None:
    """Figure 6: the distance from cla to asymmetric LoRA at the least and at the greatest rank."""
    least, greatest = (compared(rows, list(rank["cla"])[at], list(rank["asym_lora"])[at]) for at in (0, -1))
    if least.pairs and greatest.pairs:
        said = f"{least.said}; {greatest.said}"
        closer = abs(greatest.difference) < abs(least.difference)
        bench.report.finding("a higher rank brings cla closer to asymmetric LoRA", closer, said)


def _best_and_worst(rows: list[dict[str, Any]], labels: list[str]) -> Verdict:
    """Of all pairs of methods, the verdict on the pair that is furthest apart, the better one first."""
    verdicts = [compared(rows, first, second) for first in labels for second in labels if first != second]
    return min(verdicts, key=lambda each: each.difference if each.pairs else float("inf"))


EXPERIMENT = Experiment(
    name="beyond_lora/ablations",
    shows="Beyond LoRA, tables 8, 10 and 12, and figure 6",
    question="What do rank, scaling factor and the number of chains do?",
    run=run,
    folder=Path(__file__).parent,
)
