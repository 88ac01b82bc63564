"""Errors as one line on standard error."""

import sys
from collections.abc import Callable

from jaxsparse.common.errors import InputError, Stopped

__all__ = ["reported"]


def reported(command: str, work: Callable[[], int]) -> int:
    """Runs a command's work and returns its exit status: 2 for bad input, 130 or 143 after a signal.

    Args:
        command: its name.
        work: returns an exit status.

    Example:
        >>> reported("demo", lambda: 0)
        0
    """
    try:
        return work()
    except (InputError, OSError) as error:
        print(f"jaxsparse {command}: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"jaxsparse {command}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"jaxsparse {command}: interrupted", file=sys.stderr)
        return 130
