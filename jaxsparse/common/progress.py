"""Progress on standard error: a bar on a terminal, a line now and then in a log."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Advance", "progress"]

Advance = Callable[..., None]

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(what: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Shows how far a piece of work is.

    Args:
        what: what is being done, such as "training".
        total: how many units there are.
        done: how many are done already.

    Yields:
        A function (units, text) that reports units done and a short text to show beside them.

    Example:
        >>> with progress("counting", 2) as advance:
        ...     advance(1, "one")
        ...     advance(1, "two")
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_lines(what, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, text="")

        def advance(units: int, text: str = "") -> None:
            bar.update(task, advance=units, text=text)

        yield advance


def _log_lines(what: str, total: int, done: int) -> Advance:
    """Writes a line at the end, and before it one every few seconds."""
    console = Console(stderr=True)
    start = last = time.monotonic()
    first = done

    def advance(units: int, text: str = "") -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if done < total and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - start) / max(done - first, 1) * (total - done)
        console.print(
            f"{what} {done}/{total}, {now - start:.0f} s, {left:.0f} s left  {text}", highlight=False, soft_wrap=True
        )

    return advance
