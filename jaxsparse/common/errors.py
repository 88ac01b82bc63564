"""The errors that a user's input can cause, and the end that a user can ask for."""

import signal

__all__ = ["InputError", "Stopped"]


class InputError(ValueError):
    """Something the user gave does not work; the message is one line that says what would.

    The command line prints the message alone and exits with code 2; from Python it is a ValueError.
    """


class Stopped(Exception):
    """A run ended because a signal asked it to, with a checkpoint to go on from.

    Args:
        number: the signal.
        step: the step after which it ended.

    Attributes:
        status: what the command line exits with.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; go on with --resume")
        self.status = 128 + number
