"""Pictures: made without a screen, with labels, and checked to show something."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection, PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["band", "panels", "save_picture", "shared_legend"]


def panels(columns: int = 1, rows: int = 1, *, title: str, size: tuple[float, float] = (6.0, 4.2)) -> tuple:
    """Returns a figure with a title, and its panels as an array of (rows, columns).

    Args:
        columns: panels side by side.
        rows: panels one above the other.
        title: of the figure.
        size: of one panel in inches.
    """
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def band(panel: Axes, x: Sequence[float], of_seeds: Sequence[Sequence[float]], label: str, **line: object) -> None:
    """Draws the median over seeds as a line, and from the least to the greatest as a band.

    Args:
        panel: where.
        x: the places, in order.
        of_seeds: for every seed the values at `x`; nan where there is none.
        label: for the legend.
        **line: colour and style.
    """
    values = np.array([list(each) for each in of_seeds], float)
    there = ~np.all(np.isnan(values), axis=0)
    places, values = np.asarray(x, float)[there], values[:, there]
    drawn = panel.plot(places, np.nanmedian(values, axis=0), label=label, **line)[0]
    if len(values) > 1:
        panel.fill_between(
            places, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=drawn.get_color(), alpha=0.15, lw=0
        )


def shared_legend(figure: Figure, panel: Axes) -> None:
    """Puts a panel's legend under all panels, where it hides nothing; theirs must be the same."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def save_picture(figure: Figure, file: Path) -> None:
    """Saves a figure as PNG, once it is sure that one can read it.

    Args:
        figure: the figure.
        file: where to.

    Raises:
        ValueError: a panel shows nothing, has an axis without a label, or several lines and no legend; or there is no
            title. These are errors of an experiment's code.
    """
    shown = [panel for panel in figure.axes if panel.get_label() != "<colorbar>"]
    if not (figure.get_suptitle() or all(panel.get_title() for panel in shown)):
        raise ValueError(f"{file.name}: no title")
    for panel in shown:
        if not _finite_data(panel):
            raise ValueError(f"{file.name}: a panel shows no data")
        if not (panel.get_xlabel() and panel.get_ylabel()):
            raise ValueError(f"{file.name}: an axis has no label")
        named = [label for label in panel.get_legend_handles_labels()[1] if not label.startswith("_")]
        if len(named) > 1 and panel.get_legend() is None and not figure.legends:
            raise ValueError(f"{file.name}: several lines and no legend")
        _name_powers(panel)
    figure.savefig(file, format="png")


def _name_powers(panel: Axes) -> None:
    """Writes 1, 2, 5, 10 … at logarithmic axes of few powers of ten, where the usual names of ticks overlap."""
    for axis, (low, high) in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        if isinstance(axis.get_major_locator(), LogLocator) and high < 50 * low:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}")
            )
            axis.set_minor_formatter(NullFormatter())


def _finite_data(panel: Axes) -> bool:
    """Whether a line, bar, point, surface or picture of a panel has finite values."""
    lines = any(np.isfinite(np.asarray(line.get_ydata(), float)).any() for line in panel.lines)
    bars = any(math.isfinite(bar.get_height()) for bar in _bars(panel))
    return bool(lines or bars or panel.images or any(_shows(each) for each in panel.collections))


def _shows(collection: Collection) -> bool:
    """Whether points, if it is of points, lie anywhere; bands, contours and surfaces do."""
    if not isinstance(collection, PathCollection):
        return True
    return bool(np.isfinite(np.asarray(np.ma.filled(collection.get_offsets(), np.nan), float)).all(axis=-1).any())


def _bars(panel: Axes) -> list:
    return [patch for patch in panel.patches if hasattr(patch, "get_height")]
