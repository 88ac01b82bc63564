"""The errors that a user's input can cause."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something the user gave does not work; the message is one line that says what would.

    The command line prints the message alone and exits with code 2; from Python it is a ValueError.
    """
