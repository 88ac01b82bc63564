"""GASDU, tables 11 to 13: more entries at a time, and the size of the adapter that comes out."""

import tempfile
from pathlib import Path
from typing import Any

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import bars, compared, scores
from experiments.runner.experiment import Experiment
from experiments.runner.training import Tuned
from jaxsparse import deltas

__all__ = ["EXPERIMENT"]


def delta_size(tuned: Tuned) -> dict[str, Any]:
    """Saves what changed, and returns its entries and bytes."""
    delta = tuned.job.tuner.delta(tuned.state, tuned.base().params)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        deltas.save(path, delta)
        return {"entries": delta.entries, "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file())}


def run(bench: Bench) -> None:
    """Compares budgets on every task, and measures the deltas."""
    rows = bench.compare(delta_size)
    bench.report.table("scores", scores(bench, rows), "Held-out loss (nats a token) and exact match (%), by task")
    bars(bench, rows, "loss", "Held-out loss by update budget", "nats a token")
    budgets = [label for label in bench.labels if label.endswith("%")]
    if len(budgets) > 1:
        verdict = compared(rows, budgets[-1], budgets[0])
        bench.report.finding("a larger budget does better", verdict.lower, verdict.said)
    table = []
    for label in bench.labels:
        entries = median_of(rows, lambda row: row["observed_values"]["entries"], label=label)
        size = median_of(rows, lambda row: row["observed_values"]["bytes"], label=label)
        slots = median_of(rows, "slots", label=label)
        if entries is not None and size is not None and slots is not None:
            table.append(
                {
                    "method": label,
                    "entries at a time": int(slots[0]),
                    "entries changed": int(entries[0]),
                    "delta, KB": size[0] / 1e3,
                    "bytes an entry": size[0] / max(entries[0], 1),
                }
            )
    bench.report.table("sizes", table, "What is saved: entries that ever moved, and bytes on disk")
    found = {line["method"]: line for line in table}
    if budgets and budgets[0] in found and "full" in found:
        ratio = found[budgets[0]]["delta, KB"] / found["full"]["delta, KB"]
        said = f"{found[budgets[0]]['delta, KB']:.3g} KB, {ratio:.1%} of full fine-tuning's delta"
        bench.report.finding("the adapter is a small part of the model (paper: 48 MB of 13.5 GB)", ratio < 0.1, said)
    bench.report.printed(EXPERIMENT.folder / "paper_12.csv", "table 12, LLaMA-3-8B, exact match in %")
    bench.report.printed(EXPERIMENT.folder / "paper_13.csv", "table 13, LLaMA-2-7B")


EXPERIMENT = Experiment(
    name="gasdu/budget",
    shows="GASDU, tables 11 to 13",
    question="What do more entries at a time bring, and how large is what is saved?",
    run=run,
    folder=Path(__file__).parent,
)
