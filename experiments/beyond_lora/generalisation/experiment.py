"""Beyond LoRA, tables 3 and 16: test loss minus training loss, by method; and whether table 1's bounds order it."""

from pathlib import Path
from typing import Any

import numpy as np

import experiments.beyond_lora.tasks.experiment as tasks
from experiments.beyond_lora.layers import target_shapes
from experiments.beyond_lora.observed import gap_and_intruders
from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import bars, compared, good
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from jaxsparse.analysis import update_bound

__all__ = ["EXPERIMENT"]

_UNBOUND = ("dora", "lora_ga", "lora_one")
"""Methods of our own table that Beyond LoRA gives no bound for."""


def run(bench: Bench) -> None:
    """Compares the gaps of the trials of beyond_lora/tasks, which are not run again."""
    rows = bench.compare(gap_and_intruders)
    _table(bench, rows)
    bars(bench, rows, _gap, "Generalisation gap by method", "test loss − training loss, nats a token")
    for label in ("full", "lora"):
        verdict = compared(rows, label, "r_cla", _gap)
        bench.report.finding(f"{label} generalises worse than r_cla", verdict.higher, verdict.said)
    verdict = compared(rows, "cla", "r_cla", _gap)
    bench.report.finding("cla and r_cla, whose bounds are equal, generalise alike", verdict.within, verdict.said)
    for first, second in (("cla", "r_c3la"), ("cla", "rac_lora"), ("asym_lora", "c3la")):
        verdict = compared(rows, first, second, _gap)
        claim = f"{first}, whose bound is smaller, generalises better than {second}"
        bench.report.finding(claim, verdict.lower, verdict.said)
    _against_bounds(bench, rows)
    printed = Path(__file__).parent / "paper.csv"
    bench.report.printed(
        printed, "tables 3 and 16, text models, test − training loss at the epoch of lowest validation loss"
    )


def _gap(row: dict[str, Any]) -> float:
    gap: float = row["observed_values"]["gap"]
    return gap


def _table(bench: Bench, rows: list[dict[str, Any]]) -> None:
    table = []
    for task in bench.settings.tasks:
        for label in bench.labels:
            own = good(rows, label=label, task=task)
            if own:
                values = [row["observed_values"] for row in own]
                line: dict[str, Any] = {"task": task, "method": label}
                for name, field in (("training loss", "train_loss"), ("test loss", "test_loss"), ("gap", "gap")):
                    line[name] = float(np.median([each[field] for each in values]))
                line["gap, least"] = min(each["gap"] for each in values)
                line["gap, greatest"] = max(each["gap"] for each in values)
                # What other rows of the same kind would change, beside what another seed does.
                line["half the 95 % interval over rows"] = float(
                    np.median([(each["high"] - each["low"]) / 2 for each in values])
                )
                table.append(line)
    bench.report.table(
        "gaps", table, "Mean loss of the rows' answers, nats a token, after the last step: medians over seeds"
    )


def _against_bounds(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Every method's gap beside the first term of its bound."""
    task = bench.settings.tasks[0]
    shapes = target_shapes(bench.settings.model, bench.settings.targets)
    table = []
    for label in bench.labels:
        own, gap = good(rows, label=label, task=task), median_of(rows, _gap, label=label, task=task)
        if gap is None or label in _UNBOUND:
            continue
        options, samples = own[0]["options"], bench.settings.train_rows or 1
        rank, chains = options.get("rank", 1), options.get("chains", 1)
        bound = update_bound(own[0]["method"], shapes, rank=rank, samples=samples, chains=chains)
        table.append({"method": label, "bound, σ = 1": bound, "gap": gap[0]})
    if len(table) < 3:
        return
    bounds, gaps = (np.array([line[name] for line in table]) for name in ("bound, σ = 1", "gap"))
    figure, drawn = panels(title=f"Generalisation gap on {task} and the bound's first term", size=(7.0, 4.5))
    panel = drawn[0, 0]
    for at, line in enumerate(table):
        marker = "o" if at < 10 else "s"  # there are ten colours
        panel.plot(line["bound, σ = 1"], line["gap"], marker, label=line["method"])
    panel.set(xlabel="bound on G(ΔW) by table 1, σ = 1, log scale", ylabel="test loss − training loss", xscale="log")
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    bench.report.picture("bounds", figure, table, "Measured gap against the first term of table 1's bounds")
    correlation = _rank_correlation(bounds, gaps)
    said = f"rank correlation {correlation:+.2f} over {len(table)} methods"
    bench.report.finding(
        "a method with a larger bound has a larger gap (rank correlation above 0.5)", correlation > 0.5, said
    )


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's; equal values share their mean rank."""

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([np.mean(values < each) + np.mean(values <= each) for each in values])

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


EXPERIMENT = Experiment(
    name="beyond_lora/generalisation",
    shows="Beyond LoRA, tables 3 and 16",
    question="How much better does each method do on its training rows than on others, and do the bounds tell?",
    run=run,
    folder=tasks.EXPERIMENT.folder,  # its settings are those of the trials that both share
)
