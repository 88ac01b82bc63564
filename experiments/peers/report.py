"""What a comparison looks like: a table, curves side by side, and the numbers behind them."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator
from rich import filesize
from rich.table import Table

from experiments.runner.figures import panels, save_picture
from experiments.timing import median_and_spread
from jaxsparse.common.files import atomic_write_text

if TYPE_CHECKING:  # it imports torch, which may be missing
    from experiments.peers.comparison import Comparison, Trained

__all__ = ["as_json", "draw", "table", "write_csv"]


def table(comparisons: "Sequence[Comparison]", tokens: int, warm_up: int) -> Table:
    """Returns a line for every side of every comparison.

    Args:
        comparisons: what was found.
        tokens: of a batch, padding included, which both sides compute.
        warm_up: steps that are not timed.
    """
    columns = ("", "tokens/s", "ours / theirs", "peak memory", "of it packages", "state", "saved")
    found = Table(*columns, "first loss", "last loss", "largest difference")
    for comparison in comparisons:
        for side in (comparison.ours, comparison.theirs):
            ours = side is comparison.ours
            ratio = "{:.2f} ± {:.2f}".format(*comparison.ratio(warm_up)) if ours else ""
            difference = "" if comparison.difference is None or not ours else f"{comparison.difference:.1e}"
            peaks = (side.memory.peak_bytes, side.memory.library_bytes) if side.memory else (None, None)
            found.add_row(
                *(side.name, speed(side, tokens, warm_up), ratio),
                *("" if peak is None else filesize.decimal(peak) for peak in peaks),
                *(filesize.decimal(side.state_bytes), filesize.decimal(side.adapter_bytes)),
                *(f"{side.losses[0]:.4f}", f"{side.losses[-1]:.4f}", difference),
            )
    return found


def speed(side: "Trained", tokens: int, warm_up: int) -> str:
    """Returns tokens a second: the median, and half the distance between the quartiles."""
    median, spread = median_and_spread([tokens / seconds for seconds in side.seconds[warm_up:]])
    return f"{median:,.1f} ± {spread:,.1f}"


def draw(comparisons: "Sequence[Comparison]", file: Path) -> None:
    """Draws the losses of both sides of every comparison, a panel each."""
    columns = min(3, len(comparisons))
    rows = math.ceil(len(comparisons) / columns)
    figure, grid = panels(columns, rows, title="Training loss: the fused engine beside PEFT in torch")
    for panel, comparison in zip(grid.flat, comparisons, strict=False):
        for side, style in ((comparison.ours, "-"), (comparison.theirs, "--")):
            panel.plot(range(1, len(side.losses) + 1), side.losses, style, label=side.name)
        told = "" if comparison.difference is None else f", largest difference {comparison.difference:.1e}"
        panel.set_title(f"{comparison.setting.method}{told}")
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylabel("loss (nats per token)")
        panel.legend()
    for panel in list(grid.flat)[len(comparisons) :]:
        panel.remove()
    save_picture(figure, file)


def write_csv(comparisons: "Sequence[Comparison]", file: Path) -> None:
    """Writes loss and seconds of every step of both sides."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("method", "step", "loss_ours", "loss_theirs", "seconds_ours", "seconds_theirs", "theirs"))
    for each in comparisons:
        columns = each.ours.losses, each.theirs.losses, each.ours.seconds, each.theirs.seconds
        for step, values in enumerate(zip(*columns, strict=True), start=1):
            writer.writerow((each.setting.method, step, *values, each.theirs.name))
    atomic_write_text(file, text.getvalue())


def as_json(comparisons: "Sequence[Comparison]", tokens: int, warm_up: int) -> list[dict[str, Any]]:
    """Returns everything that was found, for JSON."""
    found = []
    for each in comparisons:
        row = dataclasses.asdict(each) | {"largest_difference": each.difference}
        for side in ("ours", "theirs"):
            timed = getattr(each, side).seconds[warm_up:]
            row[side]["median_s"], row[side]["spread_s"] = median_and_spread(timed)
            row[side]["tokens_per_second"] = tokens / row[side]["median_s"]
        row["ratio"], row["ratio_spread"] = each.ratio(warm_up)
        found.append(row)
    return found
