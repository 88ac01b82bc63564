"""GASDU, table 4: tokens a second and memory of a step, and what picking the support costs by density."""

import dataclasses
from pathlib import Path
from typing import Any

import optax

import jaxsparse as js
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.figures import panels
from experiments.step_cost import Case, Row, batch, measure
from jaxsparse.methods.registry import constructor_of
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel

__all__ = ["EXPERIMENT"]

_PERIOD = 50
"""M: one step in so many picks a support (section 5)."""


def run(bench: Bench) -> None:
    """Times all steps in turns, in one process: random weights of the model's shape, random tokens."""
    settings = bench.settings
    model = LanguageModel(load_config(settings.model))
    densities = settings.more["densities"]
    cases = [
        Case(label, "fused", None, step, _tuner(model, label, options, step))
        for label, options in settings.methods.items()
        for step in (("plain", "refresh") if options.get("method", label) == "gasdu" else ("plain",))
    ]
    for density in densities:
        for step, period in (("plain", 10**6), ("refresh", 1)):
            gasdu = js.gasdu(optax.adam(1e-4), density=density, refresh_every=period)
            cases.append(Case("by density", "fused", density, step, _fused(model, gasdu)))
    data = batch(model, settings.batch[0], settings.max_length)
    rows = measure(model, cases, data, settings.more["rounds"], settings.dtype)
    tokens = settings.batch[0] * settings.max_length
    _methods_table(bench, [row for row in rows if row.name != "by density"], tokens)
    _density_table(bench, {(row.density, row.step): row for row in rows if row.name == "by density"}, densities)


def _fused(model: LanguageModel, method: Any) -> Any:
    return lambda: js.fuse(model.loss, method, has_aux=True)


def _tuner(model: LanguageModel, label: str, options: dict[str, Any], step: str) -> Any:
    told = {name: value for name, value in options.items() if name not in ("method", "lr", "batch")}
    if options.get("method", label) == "gasdu":
        told |= {"refresh_every": 1 if step == "refresh" else 10**6}
    return _fused(model, constructor_of(options.get("method", label))(optax.adam(1e-4), **told))


def _amortised(rows: list[Row]) -> list[Row]:
    """A row a method; where it picks supports at one step of M, the time is that of M steps / M."""
    found = {row.name: row for row in rows if row.step == "plain"}
    for row in rows:
        if row.step == "refresh":
            plain = found[row.name]
            seconds = plain.median_s + (row.median_s - plain.median_s) / _PERIOD
            peak = max(plain.peak_bytes, row.peak_bytes)
            found[row.name] = dataclasses.replace(plain, median_s=seconds, peak_bytes=peak)
    return list(found.values())


def _methods_table(bench: Bench, rows: list[Row], tokens: int) -> None:
    plain = {row.name: row for row in rows if row.step == "plain"}
    found = {row.name: row for row in _amortised(rows)}
    full = found["full"].median_s if "full" in found else float("nan")
    table = [
        {
            "method": row.name,
            "tokens/s": tokens / row.median_s,
            "ms a step": 1e3 * row.median_s,
            "spread, ms": 1e3 * row.spread_s,
            "speedup": full / row.median_s,
            "peak memory, MB": row.peak_bytes / 1e6,
            "state, MB": row.state_bytes / 1e6,
        }
        for row in found.values()
    ]
    caption = f"Training steps, interleaved in one process; GASDU's with one refresh in M = {_PERIOD}"
    bench.report.table("methods", table, caption)
    if "gasdu" in found and "fixed mask" in found:
        ratio = plain["gasdu"].median_s / plain["fixed mask"].median_s
        said = f"plain steps take {ratio:.3f} of a fixed mask's"
        bench.report.finding("between refreshes GASDU costs what a fixed mask does", 0.9 < ratio < 1.1, said)
    if "gasdu" in found and "full" in found:
        ours, theirs = found["gasdu"], found["full"]
        ratio, memory = theirs.median_s / ours.median_s, 1 - ours.peak_bytes / theirs.peak_bytes
        faster = ours.median_s + ours.spread_s < theirs.median_s - theirs.spread_s
        said = f"{ratio:.2f} times as fast, {memory:.0%} less memory; the paper's 10.64 and 70 % are against offloading"
        claim = "GASDU is faster than full fine-tuning and takes less memory"
        bench.report.finding(claim, faster and memory > 0, said)
    bench.report.printed(EXPERIMENT.folder / "paper_a.csv", "table 4a, LLaMA-2-7B on two H100s, rows of 768 tokens")


def _density_table(bench: Bench, rows: dict[tuple[float | None, str], Row], densities: list[float]) -> None:
    table = []
    for density in densities:
        plain, refresh = rows[density, "plain"], rows[density, "refresh"]
        block = refresh.median_s - plain.median_s
        table.append(
            {
                "density": density,
                "base block, ms": 1e3 * plain.median_s,
                "refresh block, ms": 1e3 * block,
                "spread, ms": 1e3 * (plain.spread_s + refresh.spread_s),
                f"refresh share of a step at M = {_PERIOD}, %": 100 * block / (_PERIOD * plain.median_s + block),
            }
        )
    bench.report.table("densities", table, "What picking a support adds to a step, and the step without it")
    figure, drawn = panels(title="Cost of a GASDU step by density")
    panel = drawn[0, 0]
    for name in ("base block, ms", "refresh block, ms"):
        panel.errorbar(
            densities,
            [line[name] for line in table],
            yerr=[line["spread, ms"] for line in table],
            marker="o",
            capsize=3,
            label=name.removesuffix(", ms"),
        )
    panel.set(xlabel="density: entries / size of a target", ylabel="ms", xscale="log", ylim=(0, None))
    panel.legend()
    bench.report.picture(
        "densities_picture",
        figure,
        table,
        "Base and refresh block by density; whiskers: half the distance between quartiles",
    )
    blocks, bases = [line["refresh block, ms"] for line in table], [line["base block, ms"] for line in table]
    grown, spread = blocks[-1] / blocks[0], densities[-1] / densities[0]
    said = f"{blocks[0]:.3g} to {blocks[-1]:.3g} ms ({grown:.2f} times) over {spread:g} times the density"
    first, last = (table[at]["spread, ms"] for at in (0, -1))
    said += f"; steps by themselves spread by ±{first:.2g} and ±{last:.2g} ms"
    # Blocks are differences of steps: below their spread they may come out as nothing, or less.
    grows, flat = blocks[-1] - last > 2 * (blocks[0] + first), blocks[-1] + last < 2 * (blocks[0] - first)
    claim = "the refresh block is nearly flat in density (less than twice)"
    bench.report.finding(claim, False if grows else True if flat else None, said)
    grown = bases[-1] / bases[0]
    said = f"{bases[0]:.3g} to {bases[-1]:.3g} ms ({grown:.2f} times); the paper's grows 42 times over 1,000 times"
    bench.report.finding("the base block stays bounded (less than four times)", grown < 4, said)
    bench.report.printed(EXPERIMENT.folder / "paper_b.csv", "table 4b, LLaMA-2-7B on ARC-C")


EXPERIMENT = Experiment(
    name="gasdu/cost",
    shows="GASDU, table 4",
    question="What do steps cost, and what does picking a support add to one of them?",
    run=run,
    folder=Path(__file__).parent,
)
