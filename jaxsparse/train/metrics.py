"""Metrics of a run: one JSON line a step, and TensorBoard on request."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text

__all__ = ["MetricsWriter"]


class MetricsWriter:
    """Appends a line of JSON per step to `metrics.jsonl`.

    Args:
        folder: the run's folder.
        start_step: steps that are done; lines of later ones, which a killed run may have left, are removed.
        tensorboard: write event files to `folder/tensorboard` too.

    Raises:
        InputError: TensorBoard is asked for and tensorboardX is not installed.
    """

    def __init__(self, folder: Path, start_step: int = 0, *, tensorboard: bool = False) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start_step] if start_step else []
        atomic_write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", start_step) if tensorboard else None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, **values: int | float) -> None:
        """Writes one step's metrics."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file but for a last one that was cut off while being written."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs tensorboardX: pip install 'jaxsparse[tensorboard]'") from None
    return SummaryWriter(str(folder), purge_step=start_step)
