"""Checkpoints written while training goes on."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jaxsparse import deltas
from jaxsparse.train.checkpoints import RunCheckpoint, save_checkpoint

__all__ = ["Saver"]


class Saver:
    """Writes checkpoints in the background, one at a time.

    The host's copies are taken at once, before the next step takes the memory; the delta is made, and all is written,
    while that step runs. Orbax's own asynchronous checkpointer knows nothing of the delta and the iterator's state
    beside its arrays: a checkpoint is to appear whole or not at all.

    Args:
        folder: where the run's checkpoints lie.
        base: host copies of the weights that may move, by path, before training.
        base_fingerprint: of the base.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, base: dict[str, np.ndarray], base_fingerprint: str, *, keep: int) -> None:
        self._folder, self._base, self._fingerprint, self._keep = folder, base, base_fingerprint, keep
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(
        self, step: int, moving: dict[str, Any], method_state: Any, data_state: dict[str, Any], totals: dict[str, Any]
    ) -> None:
        """Takes copies and starts to write them, once the checkpoint before this one is written.

        Args:
            step: optimizer steps done.
            moving: the weights that may move, by path.
            method_state: the method's state.
            data_state: the data iterator's, as JSON can hold it.
            totals: sums for the report, as JSON can hold them.

        Raises:
            InputError: the checkpoint before this one could not be written.
        """
        self.wait()
        # Copies: what NumPy sees of an array on CPU is the array's own memory, which the next step takes.
        moved, state = jax.tree.map(np.array, (moving, method_state))
        sums = copy.deepcopy((data_state, totals))
        self._pending = self._thread.submit(self._write, step, moved, state, *sums)

    def wait(self) -> None:
        """Waits until all is written.

        Raises:
            InputError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, moving: dict[str, Any], method_state: Any, data_state: Any, totals: Any) -> None:
        delta = deltas.diff(self._base, moving, base_fingerprint=self._fingerprint, step=step)
        save_checkpoint(self._folder, RunCheckpoint(step, delta, method_state, data_state, totals), keep=self._keep)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
