"""Signals that ask a run to end: it finishes its step first, and saves."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequests"]


class StopRequests:
    """Takes SIGTERM and the first SIGINT while it is entered; a second SIGINT ends the program at once.

    Attributes:
        received: the signal that was received, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number
