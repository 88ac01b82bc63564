"""`jaxsparse delta info`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import filesize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxsparse import deltas
from jaxsparse.cli.delta_files import named_paths, said_of
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import check_writable

__all__ = ["InfoConfig", "info"]

# In files and pipes: the tables fit without breaking a word.
_WIDTH = 130


@dataclass(frozen=True)
class InfoConfig:
    """Tells what deltas hold: how many weights change, where, of which kind, by which method, and the size on disk.

    Of several deltas of one base it also tells which weights they share. No model is read.

    Example: jaxsparse delta info runs/math/delta runs/code/delta --picture changes.png
    """

    deltas: tyro.conf.Positional[tuple[str, ...]]
    """Paths of deltas, or NAME=PATH."""
    picture: Path | None = None
    """Draw a heat map of where the changes are, layers by tensors, into this .png, .pdf or .svg file, with a .csv file
    of its numbers beside it."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of tables."""


def info(config: InfoConfig) -> None:
    """Reads the deltas, draws them if asked to, and prints what they hold."""
    paths = named_paths(config.deltas)
    if not paths:
        raise InputError("give at least one delta: jaxsparse delta info PATH")
    if config.picture is not None:
        check_writable(config.picture.parent)
    loaded = {name: deltas.load(path) for name, path in paths.items()}
    said = {
        name: {"path": str(path), **deltas.describe(loaded[name]), "on_disk": said_of(path, loaded[name])}
        for name, path in paths.items()
    }
    bases = {delta.metadata.base_fingerprint for delta in loaded.values()} - {None}
    shared = deltas.overlap(loaded) if len(bases) <= 1 else []
    if config.picture is not None:
        only = len(loaded) == 1
        deltas.heat_map(next(iter(loaded.values())) if only else loaded, config.picture)
    if config.json:
        print(json.dumps({"deltas": said, "overlap": shared}, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for name, one in said.items():
        _show(console, name, one)
    if shared:
        console.print(_overlap(shared))
    if len(bases) > 1:
        console.print("They belong to different bases: what they have in common is not counted.", highlight=False)
    if config.picture is not None:
        console.print(f"{config.picture} and {config.picture.with_suffix('.csv')}", markup=False, highlight=False)


def _show(console: Console, name: str, said: Mapping[str, Any]) -> None:
    """Prints what one delta holds: a few lines, and a table of its tensors."""
    on_disk = said["on_disk"]
    per_entry = "" if on_disk["bytes_per_entry"] is None else f", {on_disk['bytes_per_entry']:.2f} bytes per entry"
    fingerprint = f"fingerprint {said['base_fingerprint'][:16]}" if said["base_fingerprint"] else None
    lines = {
        "path": said["path"],
        "entries": f"{'up to ' * ('factors' in said['kinds'])}{said['entries']:,} weights change, "
        f"in {len(said['tensors'])} tensors",
        "on disk": filesize.decimal(on_disk["bytes_on_disk"]) + per_entry,
        "kinds": ", ".join(said["kinds"]),
        "method": said["method"],
        "options": ", ".join(f"{option}={value}" for option, value in said["options"].items()),
        "base": ", ".join(filter(None, (said["base_name"], fingerprint))),
        "layers": ranges(said["layers"]),
        "step": said["step"],
    }
    summary = _table(escape(name), "")
    for what, value in lines.items():
        if value not in (None, ""):
            summary.add_row(what, escape(str(value)))
    console.print(summary)
    table = _table("tensor", "shape", "dtype", "kind", "entries", "density", "stored", "layers")
    for path, tensor in said["tensors"].items():
        shape = " x ".join(map(str, tensor["shape"]))
        numbers = f"{tensor['entries']:,}", f"{100 * tensor['density']:.3g} %", f"{tensor['stored']:,}"
        table.add_row(escape(path), shape, tensor["dtype"], _kind(tensor), *numbers, ranges(tensor["layers"]))
    console.print(table)


def _kind(tensor: Mapping[str, Any]) -> str:
    if tensor["kind"] == "slices":
        return f"{tensor['slices']} {tensor['axis']} slices"
    if tensor["kind"] == "factors":
        return f"factors of rank {tensor['rank']}{', gain' if tensor['gain'] else ''}"
    return tensor["kind"]


def _overlap(pairs: Sequence[Mapping[str, Any]]) -> Table:
    """What every two deltas share: in all, and in each tensor that both change."""
    table = _table("two deltas", "tensor", "both change", "of the smaller", "of either", title="weights in common")
    for pair in pairs:
        for path, part in {"all": pair, **pair["tensors"]}.items():
            shares = (f"{100 * part[name]:.3g} %" for name in ("share", "jaccard"))
            names = " and ".join(pair["deltas"]) if path == "all" else ""
            table.add_row(escape(names), escape(path), f"{part['shared']:,}", *shares)
        table.add_section()
    return table


def _table(*names: str, title: str | None = None) -> Table:
    """An empty table with numbers to the right."""
    right = {"entries", "density", "stored", "both change", "of the smaller", "of either"}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def ranges(numbers: Sequence[int]) -> str:
    """Returns increasing numbers in few words.

    Args:
        numbers: such as layers.

    Example:
        >>> ranges([0, 1, 2, 5, 7, 8])
        '0-2, 5, 7-8'
    """
    if not numbers:
        return ""
    starts = [numbers[0], *(later for earlier, later in pairwise(numbers) if later != earlier + 1)]
    ends = [*(earlier for earlier, later in pairwise(numbers) if later != earlier + 1), numbers[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
