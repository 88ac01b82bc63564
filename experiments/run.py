"""Runs experiments of the papers, and writes a report for each and a page that links them all."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from experiments.catalogue import chosen
from experiments.runner.bench import Bench
from experiments.runner.experiment import Experiment
from experiments.runner.index import write_index
from experiments.runner.paper_plan import plan_trials
from experiments.runner.report import Report
from experiments.runner.settings import Scale, Settings, load_settings
from experiments.runner.tiny_base import make_tiny_base
from experiments.runner.trials import TrialStore
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import InputError, Stopped
from jaxsparse.common.files import check_writable


@dataclass(frozen=True)
class RunConfig:
    """Makes tables and figures of the papers again, on real data, at one of three sizes.

    Every trial is a line of trials.jsonl; what is there is not run again, so that a call that was stopped goes on where
    it was. Each experiment leaves report.md with tables, pictures and their data; index.md links them all. Exits with 1
    if a trial failed, 2 if nothing could start.

    Example: python -m experiments.run gasdu/refresh_interval --scale tiny --data-root ../shared/data
    """

    name: tyro.conf.Positional[str]
    """An experiment, a paper (gasdu, neuroada, s2ft, beyond_lora, gallop), or all; `python -m experiments.list`."""
    scale: Scale = "tiny"
    """tiny: minutes on two cores, a model pre-trained here. small: SmolLM2-135M. paper: the paper's model and
    hyper-parameters; on a machine without an accelerator it is planned and compiled for one, not run."""
    data_root: Path = Path("../shared/data")
    """Where the data lie; nothing is downloaded."""
    methods: tuple[str, ...] = ()
    """Only these methods, by their labels in the experiment's config.yaml; none named: all."""
    seeds: int | None = None
    """So many seeds instead of the settings' number."""
    model: str | None = None
    """Another model than the settings': a folder, a file or a known name."""
    out: Path = Path("runs/experiments")
    """Folder for the results."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the findings as JSON instead of lines."""


def main(arguments: Sequence[str]) -> int:
    """Runs the experiments one after the other."""
    config = parse(lambda given: RunConfig, "python -m experiments.run", arguments)
    experiments = chosen(config.name)
    if config.seeds is not None and config.seeds < 1:
        raise InputError(f"seeds must be at least 1, got {config.seeds}")
    if not config.data_root.is_dir():
        raise InputError(f"data_root={config.data_root} is no folder; see ../shared/data/SOURCES.md for what it holds")
    settings = {each.name: _settings(config, each) for each in experiments}
    out = config.out / config.scale
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    # Seeds of a method often run the same program.
    jax.config.update("jax_compilation_cache_dir", str((config.out / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "jaxsparse")}
    store = TrialStore(out, config.data_root, versions | {"device": jax.devices()[0].device_kind})
    failed = 0
    # One that has none of the chosen methods is left out.
    experiments = [each for each in experiments if settings[each.name].methods or not config.methods]
    for experiment in experiments:
        report = _run(config, experiment, settings[experiment.name], store)
        failed += len(report.failures)
        write_index(out)
        if not config.json:
            for verdict in report.verdicts() + [f"failed: {line}" for line in report.failures]:
                print(f"{experiment.name}: {verdict}", flush=True)
    if config.json:
        names = (each.name for each in experiments)
        print(json.dumps({name: json.loads((out / name / "findings.json").read_text()) for name in names}, indent=1))
    else:
        print(f"reports: {out / 'index.md'}")
    return 1 if failed else 0


def _settings(config: RunConfig, experiment: Experiment) -> Settings:
    settings = load_settings(experiment.config, config.scale)
    unknown = set(config.methods) - set(settings.methods)
    if unknown and config.name == experiment.name:
        known = ", ".join(settings.methods)
        raise InputError(f"{experiment.name} has no method {', '.join(sorted(unknown))}; it has {known}")
    kept = {label: each for label, each in settings.methods.items() if not config.methods or label in config.methods}
    return dataclasses.replace(
        settings,
        methods=kept,
        seeds=settings.seeds if config.seeds is None else config.seeds,
        model=settings.model if config.model is None else config.model,
    )


def _run(config: RunConfig, experiment: Experiment, settings: Settings, store: TrialStore) -> Report:
    """Runs one experiment; whatever happens in it, there is a report."""
    folder = store.folder / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    store.used.clear()
    for old in (*folder.glob("*.png"), *folder.glob("*.csv")):  # a report links what this call made
        old.unlink()
    report = Report(folder, f"{experiment.shows}: {experiment.name}, {config.scale} scale", experiment.question)
    console = Console(stderr=True, soft_wrap=True)

    def tell(row: dict[str, Any]) -> None:
        match = f", exact match {row['exact_match']:.1%}" if "exact_match" in row else ""
        said = row.get("error") or f"loss {row['loss']:.3f}{match}, {row['seconds']} s"
        told = f"{experiment.name}: {row['label']} on {row['task']}, lr {row['lr']:g}, seed {row['seed']}: {said}"
        console.print(told, markup=False, highlight=False)

    try:
        if settings.model == "tiny-base":
            base = make_tiny_base(config.out / "tiny-base", config.data_root)
            settings = dataclasses.replace(settings, model=str(base))
        bench = Bench(settings, config.scale, folder, config.data_root, store, report, tell)
        if config.scale == "paper" and jax.default_backend() == "cpu":
            plan_trials(bench)
        else:
            experiment.run(bench)
    except Stopped:
        raise
    except InputError as error:
        report.failure(str(error))
    except Exception as error:  # one experiment's crash must not cost the others
        report.failure(f"{type(error).__name__}: {error}")
        console.print_exception()
    lines = {f"{row['label']} on {row['task']}, seed {row['seed']}: {row['error']}": None for row in store.failed}
    report.failures.extend(lines)
    command = f"python -m experiments.run {experiment.name} --scale {config.scale} --data-root {config.data_root}"
    report.write({"command": command, "settings": dataclasses.asdict(settings), "versions": store.versions})
    return report


if __name__ == "__main__":
    raise SystemExit(reported("experiments.run", lambda: main(sys.argv[1:])))
