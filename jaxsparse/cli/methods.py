"""`jaxsparse methods`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from rich import filesize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxsparse.cli.arguments import parse
from jaxsparse.methods.overview import Overview, overview
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.subspaces.targets import tree_size

__all__ = ["MethodsConfig", "main"]

# In files and pipes: the tables fit without breaking a word.
_WIDTH = 110


@dataclass(frozen=True)
class MethodsConfig:
    """Lists all methods at their default options; with --model, what each of them trains and stores on that model.

    The engine is what `jaxsparse finetune` runs a method on; "after calibration" it looks at the gradients of the first
    batches before training. No weights are read. `jaxsparse finetune --method NAME --help` tells all options of one.

    Example: jaxsparse methods --model smollm2-135m
    """

    model: str | None = None
    """A folder (ours or Hugging Face's), its config.json alone, a .gguf or llama2.c file, or a known name such as
    smollm2-135m."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights: narrow ones have masters."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments and prints the list."""
    config = parse(lambda given: MethodsConfig, "jaxsparse methods", arguments)
    rows, parameters = overview(), None
    if config.model is not None:
        model = load_config(config.model)
        params = LanguageModel(model).abstract(config.dtype)
        rows, parameters = overview(params, head_size=model.head_dim), tree_size(params)
    if config.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1, allow_nan=False))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    if parameters is None:
        console.print(_methods(rows))
    else:
        console.print(_costs(rows, f"{config.model}: {parameters:,} parameters, {config.dtype}; state with Adam"))
        for row in rows:
            if row.problem is not None:
                console.print(f"{row.method}: {row.problem}", markup=False, highlight=False)
    console.print("* an example: this option has no default", markup=False, highlight=False)
    return 0


def _methods(rows: Sequence[Overview]) -> Table:
    """What the methods are."""
    table = _table("method", "subspace", "what it trains", "engine", "paper", "budget, schedule")
    for row in rows:
        table.add_row(
            row.method, row.subspace, row.trains, row.engine, row.paper, _shown(row, row.budget | row.schedule)
        )
    return table


def _costs(rows: Sequence[Overview], title: str) -> Table:
    """What the methods cost on a model."""
    table = _table("method", "subspace", "engine", "paper", "budget", "trainable", "%", "state")
    table.title, table.title_justify = title, "left"
    for row in rows:
        numbers = ("-", "-", "-")
        if row.trainable is not None and row.share is not None and row.state_bytes is not None:
            share = f"{100 * row.share:.3f}" if row.share < 0.1 else f"{100 * row.share:.1f}"
            numbers = (f"{row.trainable:,}", share, filesize.decimal(row.state_bytes))
        paper = row.paper.split(" (")[0]
        table.add_row(row.method, row.subspace, row.engine, paper, _shown(row, row.budget), *numbers)
    return table


def _table(*names: str) -> Table:
    """An empty table, in which some columns may wrap and numbers are to the right."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(
            name,
            justify="right" if name in ("trainable", "%", "state") else "left",
            no_wrap=name not in ("subspace", "what it trains", "engine", "paper"),
            overflow="fold",
        )
    return table


def _shown(row: Overview, options: dict[str, Any]) -> str:
    """Options, one a line."""
    lines = []
    for option, value in options.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        lines.append(f"{option}={text}{'*' if option in row.examples else ''}")
    return "\n".join(lines)
