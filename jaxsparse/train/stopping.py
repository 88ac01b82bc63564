"""Signals that ask a run to end: it finishes its step first, and saves."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from jaxsparse.common.errors import Stopped

__all__ = ["StopRequests"]


class StopRequests:
    """Takes SIGTERM and the first SIGINT while it is entered; a second SIGINT ends the program at once.

    Afterwards signals end the program at once again: what then goes on, measuring and saving the result, may take
    minutes, and is done again by a run that resumes.

    Args:
        of_all: several processes work together: JAX then takes SIGTERM, and has all of them end after one step.

    Attributes:
        received: the signal that was received, or None.
    """

    def __init__(self, *, of_all: bool = False) -> None:
        self._of_all = of_all
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        # Python lets only the main thread handle signals.
        if not self._of_all and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def at(self, step: int) -> int | None:
        """Returns the signal to end by after a step, or None; the same on all processes.

        Args:
            step: the step.
        """
        if not self._of_all:
            return self.received
        from jax.experimental import multihost_utils

        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._of_all and threading.current_thread() is threading.main_thread():
            # JAX would go on to take SIGTERM, and nobody asks it any more. Where all end by one, one is enough.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if isinstance(error, Stopped) else signal.SIG_DFL)
        if error is None and self._before and self.received is not None:
            # It came after the last step was asked about: nobody has acted on it.
            signal.raise_signal(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
