"""Beyond LoRA, figure 4: intruder dimensions of tuned weights over thresholds."""

from typing import Any

import numpy as np

import experiments.beyond_lora.tasks.experiment as tasks
from experiments.beyond_lora.observed import gap_and_intruders
from experiments.runner.bench import Bench
from experiments.runner.comparison import compared, good
from experiments.runner.experiment import Experiment
from experiments.runner.figures import band, panels

__all__ = ["EXPERIMENT"]

_CHAINS = {"cola": "lora", "rac_lora": "asym_lora", "c3la": "cla", "r_c3la": "r_cla"}
_COUNTED = {"intruders": "all singular vectors", "leading_intruders": "ten leading singular vectors"}


def run(bench: Bench) -> None:
    """Draws the counts of the trials of beyond_lora/tasks, not run again, and compares chains with single runs."""
    wanted = bench.settings.more["intruders"]
    labels = [label for label in bench.labels if label in wanted]
    rows = bench.compare(gap_and_intruders, labels=labels)
    figure, drawn = panels(
        len(_COUNTED), len(bench.settings.tasks), title="Intruder dimensions of a matrix", size=(6.5, 4.5)
    )
    data = [
        line
        for at, task in enumerate(bench.settings.tasks)
        for line in _draw(drawn[at], good(rows, task=task), labels, task)
    ]
    bench.report.picture(
        "intruders",
        figure,
        data,
        f"Mean number of intruder dimensions of a matrix by threshold, median and range of {len(bench.seeds)} seeds; "
        "chains dashed",
    )
    for chain, single in _CHAINS.items():
        verdict = compared(rows, chain, single, _mean_count, unit="intruders a matrix")
        bench.report.finding(f"{chain} has more intruders than {single}", verdict.higher, verdict.said)
    verdict = compared(rows, "full", "lora", _mean_count, unit="intruders a matrix")
    bench.report.finding("full fine-tuning has fewer intruders than LoRA", verdict.lower, verdict.said)
    _against_gap(bench, rows, labels)
    bench.report.text(
        "Findings are of the mean over thresholds of all singular vectors, as the paper counts; figure 4 itself is a "
        "picture without numbers. Where singular values lie close together, as the smallest do, single vectors turn "
        "into one another by small changes and count as intruders: the ten leading ones say more."
    )


def _mean_count(row: dict[str, Any]) -> float:
    return float(np.mean(row["observed_values"]["intruders"]))


def _draw(drawn: Any, rows: list[dict[str, Any]], labels: list[str], task: str) -> list[dict[str, Any]]:
    """Panels of a task, one for each way to count."""
    colours, data = {}, []
    for label in labels:
        colours[label] = colours.get(_CHAINS.get(label, ""), f"C{len(colours)}")
    for panel, (field, counted) in zip(drawn, _COUNTED.items(), strict=True):
        for label in labels:
            own = [row["observed_values"] for row in good(rows, label=label)]
            if own:
                curves = [each[field] for each in own]
                style = "--" if label in _CHAINS else "-"
                band(panel, own[0]["thresholds"], curves, label, color=colours[label], linestyle=style)
                medians = zip(own[0]["thresholds"], np.median(curves, axis=0), strict=True)
                data += [
                    {"task": task, "counted": counted, "method": label, "threshold": at, "intruders": float(count)}
                    for at, count in medians
                ]
        panel.set(title=f"{task}, {counted}", xlabel="threshold ε of |cosine|", ylabel="intruders a matrix")
        panel.legend(fontsize="small")
    return data


def _against_gap(bench: Bench, rows: list[dict[str, Any]], labels: list[str]) -> None:
    """The paper's take-away: the count does not order methods as the generalisation gap does."""
    table = []
    for label in labels:
        own = good(rows, label=label)
        if own:
            gaps = [row["observed_values"]["gap"] for row in own]
            counts = [_mean_count(row) for row in own]
            table.append(
                {
                    "method": label,
                    "intruders a matrix, mean over thresholds": float(np.median(counts)),
                    "generalisation gap, nats a token": float(np.median(gaps)),
                }
            )
    bench.report.table("beside_gap", table, "Intruder dimensions and generalisation gap, medians over tasks and seeds")
    if len(table) > 2:
        counts, gaps = ([list(line.values())[at] for line in table] for at in (1, 2))
        order = [np.argsort(np.argsort(each)) for each in (counts, gaps)]
        correlation = float(np.corrcoef(*order)[0, 1])
        said = f"rank correlation {correlation:+.2f} over {len(table)} methods"
        bench.report.finding(
            "intruders do not tell which method generalises (|rank correlation| < 0.5)", abs(correlation) < 0.5, said
        )


EXPERIMENT = Experiment(
    name="beyond_lora/intruders",
    shows="Beyond LoRA, figure 4",
    question="Do tuned weights have singular vectors that are like none of the base's, and does it matter?",
    run=run,
    folder=tasks.EXPERIMENT.folder,  # its settings are those of the trials that both share
)
