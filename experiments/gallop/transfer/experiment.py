"""GaLLoP's claims: accuracy on the task and elsewhere, what is forgotten, and how often a run collapses."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.runner.bench import Bench, median_of
from experiments.runner.comparison import Rows, compared, good
from experiments.runner.elsewhere import measure_tasks, on_other_tasks
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from experiments.runner.texts import general_text
from experiments.runner.training import Tuned, config_of, parts_of, task_rows
from experiments.runner.trials import Observe
from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.forgetting import collapse_rate, forget_ratio
from jaxsparse.evaluate.text import measure_text
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel

__all__ = ["EXPERIMENT"]

_VALUES = {
    "in": ("own task, %", "accuracy on the tuned task"),
    "out": ("other tasks, %", "accuracy on other tasks"),
    "forgot": ("forgotten, %", "share of the base's right answers that are wrong now"),
    "text": ("perplexity, times", "perplexity of general text, as a factor of the base's"),
}


def run(bench: Bench) -> None:
    """Tunes with every method and seed, measures there and elsewhere, and compares with the base."""
    observe, lines = _observer(bench), []
    before = {task: _of_base(bench, task) for task in bench.settings.tasks}
    for task in bench.settings.tasks:
        lines += [
            row | _values(row, before[task]) for row in bench.compare(observe, tasks=[task]) if "error" not in row
        ]
    collapsed = _collapsed(bench, lines, before)
    for task in bench.settings.tasks:
        _table(bench, good(lines, task=task), before[task], collapsed, task)
    _draw(bench, lines)
    for other in (label for label in bench.labels if label != "gallop"):
        _findings(bench, lines, other)
    rates = ", ".join(f"{label} {rate:.0%}" for label, rate in collapsed.items())
    differ = "gallop" in collapsed and max(collapsed.values()) > min(collapsed.values())
    least = collapsed["gallop"] <= min(collapsed.values()) if differ else None
    claim = "GaLLoP collapses no more often than the others"
    bench.report.finding(claim, least, f"{rates} of {len(bench.seeds)} seeds a task")
    bench.report.text(
        "Only GaLLoP's abstract is at hand, which prints no numbers; forget ratio and collapse are defined in "
        "jaxsparse.evaluate.forgetting. A run has collapsed whose accuracy on the other tasks is below half of the "
        "base's, or which failed."
    )


def _observer(bench: Bench) -> Observe:
    others, windows = list(bench.settings.more["others"]), bench.settings.more["text_windows"]
    elsewhere = on_other_tasks(others, rows=bench.settings.test_rows)

    def elsewhere_and_text(tuned: Tuned) -> dict[str, Any]:
        text = general_text(tuned.data_root).held_out
        longest = tuned.job.config.rows.max_length
        measured = measure_text(
            tuned.model, tuned.params, tuned.job.tokenizer, text, window=longest, most_windows=windows
        )
        return {"tasks": elsewhere(tuned), "text": measured.loss}

    elsewhere_and_text.__name__ = f"{elsewhere.__name__}, {windows} windows of text"
    return elsewhere_and_text


def _of_base(bench: Bench, task: str) -> dict[str, Any]:
    """What the base does on the same questions and text, and on the task itself."""
    settings = bench.settings
    base = load(settings.model, dtype=settings.dtype)
    if base.tokenizer is None:
        raise InputError(f"model {base.name} has no tokenizer; add its tokenizer.json to {base.folder}")
    model, told = (
        LanguageModel(base.config),
        config_of(bench.trial(bench.labels[0], task), bench.folder, bench.data_root).rows,
    )
    # As the trials do it: the same questions are left out.
    trained = parts_of(task_rows(bench.data_root, task, settings.train_from), settings.train_from)["train"]
    others = measure_tasks(
        *(model, base.params, base.tokenizer, told),
        data_root=bench.data_root,
        tasks=[*settings.more["others"], task],
        rows=settings.test_rows,
        trained=trained[: settings.train_rows],
    )
    text = general_text(bench.data_root).held_out
    windows = settings.more["text_windows"]
    measured = measure_text(model, base.params, base.tokenizer, text, window=settings.max_length, most_windows=windows)
    return {"own": others.pop(task), "tasks": others, "text": measured.loss}


def _values(row: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, float]:
    """The values of one trial; the forget ratio is that of all other tasks' questions together."""
    seen, was = row["observed_values"], before["tasks"]
    forgot = forget_ratio(_answers(was), _answers(seen["tasks"]))
    return {
        "in": 100 * row["exact_match"],
        "out": _accuracy(seen["tasks"]),
        "forgot": float("nan") if forgot is None else 100 * forgot,
        "text": math.exp(min(seen["text"] - before["text"], 700.0)),
    }


def _answers(tasks: Mapping[str, Any]) -> list[bool]:
    return [right for task in tasks.values() for right in task["right"]]


def _accuracy(tasks: Mapping[str, Any]) -> float:
    """Mean over tasks, in %."""
    return 100 * float(np.mean([task["exact_match"] for task in tasks.values()]))


def _collapsed(bench: Bench, lines: Rows, before: Mapping[str, Any]) -> dict[str, float]:
    """Share of a method's runs that collapsed on the other tasks; what failed has."""
    rates = {}
    for label in bench.labels:
        scores = []
        for task in bench.settings.tasks:
            base = _accuracy(before[task]["tasks"])
            if base:  # where the base answers nothing right there is nothing to collapse from
                own = [line["out"] / base for line in good(lines, label=label, task=task)]
                scores += own + [math.nan] * (len(bench.seeds) - len(own))
        rates[label] = collapse_rate(scores, base=1.0) if scores else math.nan
    return rates


def _table(bench: Bench, lines: Rows, before: Mapping[str, Any], collapsed: Mapping[str, float], task: str) -> None:
    own, out = 100 * before["own"]["exact_match"], _accuracy(before["tasks"])
    columns = {title: value for value, (title, _) in _VALUES.items()}
    table: list[dict[str, Any]] = [{"method": "base", "entries trained": 0}]
    table[0] |= dict(zip(columns, (own, out, 0.0, 1.0), strict=True)) | {
        "out-of-task spread": None,
        "collapsed, %": None,
    }
    for label in bench.labels:
        rows = good(lines, label=label)
        if rows:
            medians = {title: (median_of(rows, value) or [None])[0] for title, value in columns.items()}
            spread = max(row["out"] for row in rows) - min(row["out"] for row in rows)
            line = {"method": label, "entries trained": rows[0]["slots"]} | medians
            table.append(line | {"out-of-task spread": spread, "collapsed, %": 100 * collapsed[label]})
    others = ", ".join(bench.settings.more["others"])
    caption = (
        f"Tuned on {task}: medians of {len(bench.seeds)} seeds; other tasks: {others}; spread over seeds in points"
    )
    bench.report.table(task.replace("/", "_"), table, caption)


def _draw(bench: Bench, lines: Rows) -> None:
    if not lines:
        return
    figure, drawn = panels(len(_VALUES), title="On the tuned task, elsewhere, and what is forgotten", size=(4.0, 4.0))
    data = []
    for panel, (value, (title, said)) in zip(drawn[0], _VALUES.items(), strict=True):
        for place, label in enumerate(bench.labels):
            points = [line[value] for line in good(lines, label=label)]
            panel.scatter([place] * len(points), points, s=14, color=f"C{place}")
            panel.hlines(np.median(points), place - 0.3, place + 0.3, color=f"C{place}") if points else None
            data += [
                {"value": said, "method": label, "task": line["task"], "seed": line["seed"], title: line[value]}
                for line in good(lines, label=label)
            ]
        panel.set_xticks(range(len(bench.labels)), bench.labels, rotation=45)
        panel.set(xlabel="method", ylabel=title)
        panel.set_title(said, fontsize="small")
    columns = ["value", "method", "task", "seed", *(title for title, _ in _VALUES.values())]
    data = [{name: line.get(name) for name in columns} for line in data]
    bench.report.picture("transfer", figure, data, "A point a task and seed, a line for the median")


def _findings(bench: Bench, lines: Rows, other: str) -> None:
    claims = {
        "in": f"GaLLoP is no worse than {other} on the tuned task (accuracy)",
        "out": f"GaLLoP is no worse than {other} on other tasks (accuracy)",
        "forgot": f"GaLLoP forgets no more of the base's right answers than {other}",
        "text": f"GaLLoP forgets no more of general text than {other} (perplexity)",
    }
    for value, claim in claims.items():
        verdict = compared(lines, "gallop", other, value, unit="of perplexity" if value == "text" else "points")
        seen = verdict.not_higher if value in ("forgot", "text") else _not(verdict.lower)
        # Where all runs of both end the same, say with everything forgotten, there is nothing to compare.
        ends = {line[value] for line in lines if line["label"] in ("gallop", other)}
        bench.report.finding(claim, seen if len(ends) > 1 else None, verdict.said)


def _not(seen: bool | None) -> bool | None:
    return None if seen is None else not seen


EXPERIMENT = Experiment(
    name="gallop/transfer",
    shows="GaLLoP, its abstract's claims",
    question="Does training large gradients on small weights transfer better, forget less and collapse less often?",
    run=run,
    folder=Path(__file__).parent,
)
