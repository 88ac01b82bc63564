"""Metrics of a run: one JSON line a step, and TensorBoard on request."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.numbers import finite_or_none

__all__ = ["MetricsWriter", "NoMetrics", "check_tensorboard"]


class MetricsWriter:
    """Appends a line of JSON per step to `metrics.jsonl`.

    Args:
        folder: the run's folder.
        start_step: steps that are done; lines of later ones, which a killed run may have left, are removed.
        tensorboard: write event files to `folder/tensorboard` too; see `check_tensorboard`.
    """

    def __init__(self, folder: Path, start_step: int = 0, *, tensorboard: bool = False) -> None:
        path = folder / "metrics.jsonl"
        atomic_write_text(path, "".join(line + "\n" for line in _lines_until(path, start_step)))
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
        """Writes one step's metrics; null for what is not finite."""
        line = {name: finite_or_none(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


class NoMetrics:
    """Takes metrics and writes none: those of other processes than the first."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def write(self, step: int, **values: int | float) -> None:
        """Writes nothing."""


def check_tensorboard() -> None:
    """Raises an InputError if event files cannot be written."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise InputError("--tensorboard needs tensorboardX: pip install 'jaxsparse[tensorboard]'") from None


def _lines_until(path: Path, last_step: int) -> list[str]:
    """The lines of a file up to a step, or up to the first that is damaged."""
    if not path.exists() or not last_step:
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return kept


def _tensorboard(folder: Path, start_step: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start_step)
