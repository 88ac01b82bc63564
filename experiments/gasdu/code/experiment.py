"""GASDU, table 14: programs. Which share of HumanEval's functions is written right after tuning on programs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from experiments.runner.bench import Bench
from experiments.runner.comparison import compared
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from experiments.runner.training import config_of
from experiments.runner.trials import Trial, short_hash
from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import batches, evaluation_batches
from jaxsparse.data.examples import Example
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.engine.description import count_slots
from jaxsparse.engine.fused import fuse
from jaxsparse.evaluate.compiled import batch_loss
from jaxsparse.evaluate.human_eval import Problem, load_problems, measure_human_eval
from jaxsparse.models.checkpoints import Checkpoint, load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.optimizer import make_method

__all__ = ["EXPERIMENT"]

_FILE, _TASK = "HumanEval.jsonl", "HumanEval"


@dataclass(frozen=True)
class _Programs:
    """Programs to train on and to measure on; nothing frames them but the function's own beginning."""

    training: list[Example]
    held_out: list[Example]
    problems: list[Problem]


def run(bench: Bench) -> None:
    """Tunes on the solutions of every second problem of HumanEval, and measures on the others."""
    base = load(bench.settings.model, dtype=bench.settings.dtype)
    if base.tokenizer is None:
        raise InputError(f"model {base.name} has no tokenizer; add its tokenizer.json to {base.folder}")
    programs = _programs(bench, base.tokenizer)
    model = LanguageModel(base.config)
    measured = _measured(bench, model, base.params, base.tokenizer, programs)
    rows = [{"label": "base", "seed": 0, "task": _TASK, "slots": 0} | measured]
    made_of = short_hash(repr((programs, base.fingerprint)))
    for label in bench.labels:
        for seed in bench.seeds:
            trial = bench.trial(label, _TASK, seed, observed=f"programs {made_of}")
            row = bench.run(trial, work=lambda trial: _tuned(bench, base, model, programs, trial))
            if "error" not in row:
                rows.append({name: row[name] for name in rows[0]})
    _report(bench, rows, programs)


def _programs(bench: Bench, tokenizer: Tokenizer) -> _Programs:
    problems = load_problems(bench.data_root / _FILE)
    longest = bench.settings.max_length

    def encoded(problem: Problem) -> Example:
        prompt, answer = tokenizer.encode(problem.prompt), tokenizer.encode(problem.canonical_solution, add_bos=False)
        assert tokenizer.eos_id is not None  # what is pre-trained or known has one
        return Example(tuple(prompt), (*answer, tokenizer.eos_id))

    def fitting(problems: list[Problem]) -> list[tuple[Problem, Example]]:
        return [(problem, example) for problem in problems if len(example := encoded(problem)) <= longest]

    held_out = fitting(problems[1::2])[: bench.settings.test_rows]
    return _Programs(
        [example for _, example in fitting(problems[::2])],
        [example for _, example in held_out],
        [problem for problem, _ in held_out],
    )


def _tuned(bench: Bench, base: Checkpoint, model: LanguageModel, programs: _Programs, trial: Trial) -> dict[str, Any]:
    assert trial.steps is not None  # the settings count steps
    method = make_method(
        config_of(trial, bench.folder, bench.data_root), base.params, trial.steps, base.config.head_dim
    )
    slots = count_slots(method, base.params)
    tuner = fuse(model.loss, method, has_aux=True)
    state = tuner.init(jax.tree.map(jax.numpy.copy, base.params), donate=True)
    data = batches(programs.training, batch_size=trial.batch, max_length=bench.settings.max_length, seed=trial.seed)
    with progress(f"{trial.label}, seed {trial.seed}", trial.steps) as advance:
        for _ in range(trial.steps):
            state, metrics = tuner.step(state, next(data))
            advance(1, f"loss {float(metrics.loss):.3f}")
    assert base.tokenizer is not None  # see run
    return {"slots": slots} | _measured(bench, model, tuner.params(state), base.tokenizer, programs)


def _measured(
    bench: Bench, model: LanguageModel, params: Any, tokenizer: Tokenizer, programs: _Programs
) -> dict[str, Any]:
    longest = bench.settings.max_length
    losses, tokens = 0.0, 0.0
    for part in evaluation_batches(programs.held_out, batch_size=8, max_length=longest):
        _, aux = batch_loss(model, params, part)
        losses, tokens = losses + float(aux["loss_sum"]), tokens + float(aux["tokens"])
    with progress("writing and running programs", len(programs.problems)) as advance:
        passed = measure_human_eval(
            *(model, params, tokenizer, programs.problems),
            max_new_tokens=bench.settings.max_new_tokens,
            advance=advance,
        )
    return {"loss": losses / tokens, "pass@1": 100 * sum(passed.values()) / len(passed)}


def _report(bench: Bench, rows: Sequence[dict[str, Any]], programs: _Programs) -> None:
    labels = ["base", *bench.labels]
    table = []
    for label in labels:
        own = [row for row in rows if row["label"] == label]
        if not own:
            continue
        line: dict[str, Any] = {"method": label, "entries trained": own[0]["slots"]}
        table.append(line | {name: statistics.median(row[name] for row in own) for name in ("pass@1", "loss")})
    counted = f"{len(programs.training)} solutions to train on, {len(programs.problems)} problems to measure on"
    bench.report.table("programs", table, f"pass@1 in % and loss of the right solutions in nats a token; {counted}")
    figure, drawn = panels(2, title="Programs: HumanEval's other half after tuning on one half")
    for panel, (name, unit) in zip(
        drawn[0], {"pass@1": "pass@1, %", "loss": "loss, nats a token"}.items(), strict=True
    ):
        for place, label in enumerate(labels):
            points = [row[name] for row in rows if row["label"] == label]
            panel.scatter([place] * len(points), points, color=f"C{place}")
        panel.set_xticks(range(len(labels)), labels)
        panel.set(xlabel="method", ylabel=unit)
    bench.report.picture("programs_picture", figure, rows, "A point a seed")
    tuned = [row for row in rows if row["label"] != "base"]
    for other in (label for label in bench.labels if label != "gasdu"):
        verdict = compared(tuned, "gasdu", other, "pass@1", unit="points")
        none = not any(row["pass@1"] for row in rows)
        seen = None if none or verdict.lower is None else not verdict.lower
        said = "no program passes" if none else verdict.said
        bench.report.finding(f"GASDU writes programs no worse than {other} (pass@1)", seen, said)
        verdict = compared(tuned, "gasdu", other, "loss")
        claim = f"GASDU is no worse than {other} on right solutions (loss)"
        bench.report.finding(claim, verdict.not_higher, verdict.said)
    bench.report.text(
        "The paper trains on Code-Feedback, which is not in the data: here every second problem of HumanEval stands "
        "for it, and the others are measured. Problems whose prompt and solution are longer than a row are left out "
        "of both. Programs run in a process of their own, with limits (jaxsparse.evaluate.sandbox)."
    )
    bench.report.printed(EXPERIMENT.folder / "paper.csv", "table 14, LLaMA-3-8B on Code-Feedback, pass@1 in %")


EXPERIMENT = Experiment(
    name="gasdu/code",
    shows="GASDU, table 14",
    question="Does a sparse update learn to write programs as full fine-tuning does?",
    run=run,
    folder=Path(__file__).parent,
)
