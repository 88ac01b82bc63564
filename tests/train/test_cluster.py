"""What is told of one of several processes by the process that watches it; none of them trains anything here."""

import signal
import subprocess
import sys

import pytest

from jaxsparse.train.stopping import StopRequests

WATCHED = """
import signal, sys, time
import jax
from jaxsparse.train import cluster
from jaxsparse.train.stopping import StopRequests
{definitions}
sys.exit(cluster.watched(work))
"""


def start_watched(definitions: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", WATCHED.format(definitions=definitions)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def raising(message: str) -> str:
    return f"def work():\n    raise jax.errors.JaxRuntimeError({message!r})"


@pytest.mark.parametrize(
    "message",
    [
        "UNAVAILABLE: Task /job:jax_worker/replica:0/task:1 heartbeat timeout",
        "FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:40001",
    ],
)
def test_an_error_whose_cause_is_another_process_is_told_in_a_line(message):
    process = start_watched(raising(message))
    _, complained = process.communicate(timeout=120)
    assert process.returncode == 3
    assert "another process of this run is lost" in complained
    assert "Traceback" not in complained


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.",
        "INTERNAL: Failed to compile the program for enabled peer access",
        "INVALID_ARGUMENT: Executable expected parameter 0 of size 8 but got buffer with incompatible size 16",
    ],
)
def test_an_error_of_its_own_is_not_blamed_on_another(message):
    process = start_watched(raising(message))
    _, complained = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in complained
    assert "another process" not in complained


def test_a_signal_that_is_missed_at_the_end_of_the_last_step_ends_what_comes_after_it():
    work = """
cluster._SECONDS_UNTIL_SENT_AGAIN = 0.5
def work():
    signal.signal(signal.SIGTERM, lambda *_: after())
    print("ready", flush=True)
    time.sleep(60)
def after():
    with StopRequests(of_all=True):
        pass
    time.sleep(60)
"""
    process = start_watched(work)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, complained = process.communicate(timeout=50)
    assert process.returncode == 128 + signal.SIGTERM
    assert complained == "jaxsparse: ended by SIGTERM while no step was running; go on with --resume\n"


def test_of_several_processes_signals_end_the_program_at_once_after_training():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with StopRequests(of_all=True):
            pass
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
