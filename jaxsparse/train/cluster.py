"""Several processes that train one model together, by JAX's own runtime."""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import jax

from jaxsparse.common.errors import InputError
from jaxsparse.train.config import ClusterConfig

__all__ = ["join", "leave", "watched"]


LOST = 3
"""The exit status where another process was lost."""
_LOST = (
    "jaxsparse: another process of this run is lost, and the others cannot go on without it; start all of them again "
    "with --resume"
)

# What errors say whose cause is another process; all others are one's own, such as too little memory.
_OF_ANOTHER = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo|NCCL|coordination|heartbeat|broken pipe"
    r"|connection (closed|reset|refused)",
    re.IGNORECASE,
)
_SECONDS_UNTIL_SENT_AGAIN = 5.0


def join(config: ClusterConfig) -> None:
    """Makes this process one of several, if the configuration says so; before anything else asks JAX for devices.

    Raises:
        InputError: the coordinator, the number of processes or this one's own is missing or not possible; or the others
            cannot be reached.
    """
    given = (config.coordinator, config.processes, config.process)
    if config.coordinator is None and not config.distributed:
        if given != (None, None, None):
            raise InputError("processes and process need --coordinator HOST:PORT, the address of the first process")
        return
    if config.coordinator is not None:
        if config.processes is None or config.process is None:
            raise InputError("--coordinator needs --processes, how many there are, and --process, this one's number")
        if not 0 <= config.process < config.processes:
            raise InputError(f"process={config.process} must lie between 0 and {config.processes - 1}")
    # On CPUs programs that overlap could meet one another's messages.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            *given,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            initialization_timeout=config.wait_seconds,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"cannot join the other processes: {reason}; start all of them within {config.wait_seconds} s, or give "
            "--coordinator HOST:PORT --processes N --process I"
        ) from error


def leave() -> None:
    """Waits until all processes end; where they know that they do. The others need the first one until then."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


def watched(work: Callable[[], int]) -> int:
    """Runs the work of one of several processes in a child, and says in a line if the others have gone.

    JAX ends a process without ceremony as soon as it knows that another is lost: its parent is there to explain. The
    child does not outlive its parent. SIGTERM and SIGINT have it save and end, which JAX arranges with the others; a
    second SIGINT ends it at once.

    Args:
        work: what to run; returns an exit status.

    Returns:
        The exit status; `LOST` where another process was lost.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        _work_and_exit(work, read)
    os.close(read)  # the other end stays open for as long as this process lives
    _pass_on_signals(child)
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not os.WIFSIGNALED(status):
        return os.WEXITSTATUS(status)
    if os.WTERMSIG(status) == signal.SIGABRT:
        print(_LOST, file=sys.stderr)
        return LOST
    if os.WTERMSIG(status) == signal.SIGTERM:
        print("jaxsparse: ended by SIGTERM while no step was running; go on with --resume", file=sys.stderr)
    return 128 + os.WTERMSIG(status)


def _work_and_exit(work: Callable[[], int], parent: int) -> NoReturn:
    """What the child does: the work, unless its parent goes; the pipe `parent` then says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent passes on what it means
    threading.Thread(target=lambda: (os.read(parent, 1), os._exit(LOST)), daemon=True).start()
    status = 1
    try:
        status = work()
    except jax.errors.JaxRuntimeError as error:
        # What a program says whose messages to the others fail; or it is ended by JAX without a word.
        if _OF_ANOTHER.search(str(error)):
            print(f"{str(error).partition(chr(10))[0]}\n{_LOST}", file=sys.stderr)
            status = LOST
        else:
            traceback.print_exc()
    except Exception:  # nobody above would print it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _pass_on_signals(child: int) -> None:
    """Has SIGTERM and SIGINT end the child in good order; JAX listens to SIGTERM.

    It looks for one once a second and tells nobody after the last step, so one that comes shortly before would be lost:
    it is sent again.
    """
    interrupted = False

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        os.kill(child, signal.SIGKILL if interrupted and number == signal.SIGINT else signal.SIGTERM)
        interrupted = interrupted or number == signal.SIGINT
        if number != signal.SIGALRM:
            signal.setitimer(signal.ITIMER_REAL, _SECONDS_UNTIL_SENT_AGAIN)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, receive)
