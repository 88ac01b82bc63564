"""A picture of where the changes of deltas are."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_bytes, atomic_write_text
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.description import layer_counts

__all__ = ["heat_map"]

_FORMATS = ("png", "pdf", "svg")
_EMPTY_WORDS = frozenset({"kernel", "weight", "embedding", "scale", "layers", "blocks", "h"})
_CELL = 0.62, 0.22
"""Inches of a cell: wide enough for a name that is turned by 45 degrees, high enough for a number."""
_NO_LAYER = "no layer"
_NOTHING = "#e0e0e0"
_USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LEAST_SPAN = 10.0
"""The colours' scale spans at least such a factor: what is nearly equal is to look so."""


class _Cell(NamedTuple):
    """A row of the CSV file."""

    delta: str
    layer: int | None
    tensor: str
    entries: int
    weights: int

    @property
    def density(self) -> float:
        return self.entries / self.weights


def heat_map(deltas: Delta | Mapping[str, Delta] | Sequence[Delta], file: str | os.PathLike[str]) -> None:
    """Draws which share of the weights of every layer and tensor changes, and writes the numbers beside it.

    Layers are rows, tensors columns, and the colour is the density on a scale by powers; several deltas are panels side
    by side, with one scale. A CSV file of the same name holds `delta`, `layer` (empty for none), `tensor`, `entries`,
    `weights` and `density` of every cell.

    Args:
        deltas: one; or several, by name, or in a row, whose names are then "0", "1", …
        file: ends in .png, .pdf or .svg. What is there is replaced.

    Raises:
        InputError: the file ends otherwise, or cannot be written; no delta changes anything.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"layers": {"kernel": jnp.zeros((3, 2, 2))}}
        >>> tuned = {"layers": {"kernel": base["layers"]["kernel"].at[1].set(1.0)}}
        >>> folder = Path(tempfile.mkdtemp())
        >>> heat_map(diff(base, tuned), folder / "changes.png")
        >>> print((folder / "changes.csv").read_text().splitlines()[2])
        delta,1,layers/kernel,4,4,1.0
    """
    target = Path(file)
    if target.suffix[1:] not in _FORMATS:
        raise InputError(f"picture {target} must end in {', '.join('.' + name for name in _FORMATS)}")
    if isinstance(deltas, Delta):
        named: dict[str, Delta] = {"delta": deltas}
    else:
        named = dict(deltas) if isinstance(deltas, Mapping) else {str(i): delta for i, delta in enumerate(deltas)}
    cells = [
        _Cell(name, layer, path, *counts)
        for name, delta in named.items()
        for path, tensor in delta.tensors.items()
        for layer, counts in layer_counts(path, tensor).items()
    ]
    if not cells:
        raise InputError("there is nothing to draw: no weight changes")
    drawn = _draw(named, cells, target.suffix[1:])
    atomic_write_bytes(target, drawn)
    atomic_write_text(target.with_suffix(".csv"), _as_csv(cells))


def _as_csv(cells: Sequence[_Cell]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_Cell._fields, "density"])
    writer.writerows([*cell, cell.density] for cell in cells)
    return text.getvalue()


def _draw(deltas: Mapping[str, Delta], cells: Sequence[_Cell], kind: str) -> bytes:
    """Returns the picture file's bytes."""
    # Imported late: it takes a second, and few who use deltas draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure

    rows, columns, names = _axes(cells)
    lowest, highest = _limits([cell.density for cell in cells if cell.entries])
    norm = LogNorm(lowest, highest)
    of_no_layer = {_column(cell.tensor) for cell in cells if cell.layer is None}
    there = np.array([[(row is None) == (column in of_no_layer) for column in columns] for row in rows])
    width = len(deltas) * max(_CELL[0] * len(columns), 3.0) + 2.6
    height = _CELL[1] * len(rows) + 2.4
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(deltas), squeeze=False, sharey=True)[0].tolist()
    for panel, (name, delta) in zip(panels, deltas.items(), strict=True):
        panel.imshow(there, cmap=ListedColormap(["white", _NOTHING]), vmin=0, vmax=1, aspect="auto")
        image = panel.imshow(_densities(cells, name, rows, columns), norm=norm, cmap="viridis", aspect="auto")
        _label(panel, rows, names, _title(None if len(deltas) == 1 else name, delta))
    panels[0].set_ylabel("layer")
    _add_scale(figure, image, panels, lowest, highest)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def _axes(cells: Sequence[_Cell]) -> tuple[list[int | None], list[str], list[str]]:
    """Returns the layers, the columns' paths and their short names; what belongs to no layer comes last."""
    numbers = [cell.layer for cell in cells if cell.layer is not None]
    rows: list[int | None] = list(range(max(numbers) + 1)) if numbers else []
    rows += [None] if any(cell.layer is None for cell in cells) else []
    columns = sorted({(cell.layer is None, _place(cell.tensor), _column(cell.tensor)) for cell in cells})
    paths = [path for _, _, path in columns]
    return rows, paths, _short_names(paths)


def _place(path: str) -> int:
    """Returns where a tensor comes among those of a layer: in the order in which the layer uses them, if known."""
    known = (place for place, name in enumerate(_USUAL_ORDER) if name in path.split("/"))
    return next(known, len(_USUAL_ORDER))


def _column(path: str) -> str:
    """Returns a tensor's path without the number of its layer."""
    return "/".join(part for part in path.split("/") if not part.isdecimal())


def _short_names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of paths, less the words that tell nothing, that differ from one another."""
    words = [[part for part in path.split("/") if part not in _EMPTY_WORDS] or path.split("/") for path in paths]
    for length in range(1, max(map(len, words)) + 1):
        names = ["/".join(parts[-length:]) for parts in words]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _densities(
    cells: Sequence[_Cell], name: str, rows: Sequence[int | None], columns: Sequence[str]
) -> Float[np.ndarray, "layers tensors"]:
    """Returns the density of every cell; NaN, which is not drawn, where nothing changes."""
    values = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        if cell.delta == name and cell.entries:
            values[rows.index(cell.layer), columns.index(_column(cell.tensor))] = cell.density
    return values


def _limits(densities: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of the colours' scale."""
    lowest, highest = min(densities), max(densities)
    widen = max(1.0, (_LEAST_SPAN * lowest / highest) ** 0.5)
    highest = min(highest * widen, 1.0)
    return min(lowest, highest / _LEAST_SPAN), highest


def _ticks(lowest: float, highest: float) -> list[float]:
    """Returns round numbers on the scale, between three and about ten of them, and its ends."""
    powers = range(math.floor(math.log10(lowest)), 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5)):
        ticks = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
        ticks = [tick for tick in ticks if lowest <= tick <= highest * (1 + 1e-9)]
        if len(ticks) >= 4:
            break
    # The ends are told too, where no round number is near.
    ends = [end for end in (lowest, highest) if all(abs(math.log10(end / tick)) > 0.08 for tick in ticks)]
    return sorted([*ticks, *ends])


def _title(name: str | None, delta: Delta) -> str:
    lines = [] if name is None else [name]
    lines.append(f"{delta.entries:,} weights change")
    if delta.metadata.method is not None:
        lines.append(f"method {delta.metadata.method}")
    return "\n".join(lines)


def _label(panel: Any, rows: Sequence[int | None], names: Sequence[str], title: str) -> None:
    """Names the rows and columns of a panel and draws lines between its cells."""
    panel.set_title(title, fontsize=10, parse_math=False)
    panel.set_xlabel("tensor")
    panel.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    step = 1 if len(rows) <= 40 else 5
    shown = [place for place, row in enumerate(rows) if row is None or row % step == 0]
    labels = [_NO_LAYER if rows[place] is None else str(rows[place]) for place in shown]
    panel.set_yticks(shown, labels, fontsize=8)
    panel.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
    panel.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    panel.grid(which="minor", color="white", linewidth=0.6)
    panel.tick_params(which="minor", length=0)


def _add_scale(figure: Any, image: Any, panels: Sequence[Any], lowest: float, highest: float) -> None:
    """Adds the colours' scale in per cent, and what grey means."""
    from matplotlib.patches import Patch

    scale = figure.colorbar(image, ax=panels, pad=0.02)
    ticks = _ticks(lowest, highest)
    scale.set_ticks(ticks, labels=[f"{100 * tick:.2g} %" for tick in ticks])
    scale.minorticks_off()
    scale.set_label("weights that change, in % of the tensor's weights in a layer (log scale)")
    figure.legend(handles=[Patch(color=_NOTHING, label="no weight changes")], loc="outside lower right", fontsize=8)
