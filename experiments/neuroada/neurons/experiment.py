"""NeuroAda, figure 6: the share of neurons that train."""

from itertools import pairwise
from pathlib import Path

from experiments.runner.bench import Bench
from experiments.runner.comparison import compared, good, loss_curve, scores
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels

__all__ = ["EXPERIMENT"]


def run(bench: Bench) -> None:
    """Compares shares of neurons, with as many inputs of each and, where the settings have them, as many entries."""
    rows = bench.compare()
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    _draw(bench, rows)
    for kind, labels in _kinds(bench).items():
        for fewer, more in pairwise(labels):
            verdict = compared(rows, more, fewer)
            bench.report.finding(f"{more} does better than {fewer} ({kind})", verdict.lower, verdict.said)
    bench.report.text(
        "The paper's figure 6 has no numbers; it says that more neurons lead to consistent improvements. With as many "
        "inputs of every neuron, more neurons are more entries too: the curve with a fixed number of entries tells "
        "whether it is neurons that matter."
    )


def _kinds(bench: Bench) -> dict[str, list[str]]:
    """Labels by curve, in order of their share of neurons."""
    curves = {"same inputs a neuron": "same inputs", "same entries": "same entries"}
    found = {kind: [label for label in bench.labels if _curve(label) == name] for kind, name in curves.items()}
    whole = [label for label in bench.labels if _curve(label) == "all"]
    return {kind: labels + whole for kind, labels in found.items() if labels}


def _curve(label: str) -> str:
    return "all" if label == "100 %" else label.partition(", ")[2]


def _draw(bench: Bench, rows: list[dict]) -> None:
    tasks = [task for task in bench.settings.tasks if good(rows, task=task)]
    if not tasks:
        return
    figure, drawn = panels(len(tasks), title="Held-out loss by the share of neurons that train")
    data = []
    for panel, task in zip(drawn[0], tasks, strict=True):
        for kind, labels in _kinds(bench).items():
            shares = {label: 100 * float(bench.settings.methods[label].get("neurons", 1.0)) for label in labels}
            data += loss_curve(panel, bench, rows, task=task, name=kind, places=shares)
        panel.set(title=task, xlabel="neurons that train, %", ylabel="held-out loss, nats a token", xscale="log")
        panel.legend()
    caption = f"Held-out loss by share of neurons, median and range of {len(bench.seeds)} seeds"
    bench.report.picture("neurons", figure, data, caption)


EXPERIMENT = Experiment(
    name="neuroada/neurons",
    shows="NeuroAda, figure 6",
    question="Does it help to train inputs of every neuron instead of some neurons?",
    run=run,
    folder=Path(__file__).parent,
)
