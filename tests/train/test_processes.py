"""Two processes with two devices each: the run of one process with four, and what happens if one of them is lost."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import arguments, metrics_of, weights

pytestmark = pytest.mark.slow
OPTIONS = {"steps": 40, "checkpoint-every": 3, "refresh-every": 2, "eval-rows": 4}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def start(model: Path, problems: dict[str, Path], out: Path, count: int, *flags: str, outs: list[Path] | None = None):
    """Starts so many processes, which have four virtual devices together; each may have a folder of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
    command = [sys.executable, "-m", "jaxsparse.cli.main", "finetune", "--mesh", "data=2,tensor=2", *flags]
    command += arguments(model, problems, out, **OPTIONS, **{"eval-data": problems["held_out"]})
    address = f"localhost:{free_port()}"
    each = [["--coordinator", address, "--processes", str(count), "--process", str(n)] for n in range(count)]
    each = [[*own, "--out", str(folder)] for own, folder in zip(each, outs or [out] * count, strict=True)]
    each = [[*own, "--heartbeat-seconds", "5"] for own in each] if count > 1 else [[]]
    pipe = subprocess.PIPE
    return [subprocess.Popen([*command, *own], env=environment, stderr=pipe, stdout=pipe, text=True) for own in each]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    ended = []
    for process in processes:
        said, complained = process.communicate(timeout=300)
        ended.append((process.returncode, said, complained))
    return ended


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(out)]


@pytest.fixture(scope="module")
def alone(tiny_model, problems, tmp_path_factory):
    """The run of one process with four devices."""
    out = tmp_path_factory.mktemp("alone") / "run"
    ((status, _, complained),) = finish(start(tiny_model, problems, out, 1))
    assert status == 0, complained
    return out


def test_two_processes_do_what_one_does(tiny_model, problems, tmp_path, alone):
    ended = finish(start(tiny_model, problems, tmp_path / "two", 2))
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(
        text[-3000:] for _, *texts in ended for text in texts
    )
    # The first process reports, the other is silent.
    assert "bit-identical" in ended[0][1]
    assert "bit-identical" not in ended[1][1]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(alone), rtol=1e-5, atol=1e-5)
    ours, theirs = (weights(tiny_model, out / "delta") for out in (tmp_path / "two", alone))
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)


def wait_for_checkpoint(processes, out):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list((out / "checkpoints").glob("step_*")):
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.01)


def child_of(process):
    """The one that works is the child of the one that explains."""
    (child,) = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    return int(child)


def is_running(pid):
    state = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and "Z" not in state


@pytest.mark.parametrize("lost", [0, 1])
def test_where_one_is_lost_the_other_says_so_and_both_resume(lost, tiny_model, problems, tmp_path, alone):
    out = tmp_path / "run"
    processes = start(tiny_model, problems, out, 2)
    wait_for_checkpoint(processes, out)
    os.kill(child_of(processes[lost]), signal.SIGKILL)
    os.kill(processes[lost].pid, signal.SIGKILL)
    status, _, complained = finish(processes)[1 - lost]
    assert status == 3, complained
    assert "another process of this run is lost" in complained
    assert "--resume" in complained
    assert not (out / "report.json").exists()
    ended = finish(start(tiny_model, problems, out, 2, "--resume"))
    assert [status for status, _, _ in ended] == [0, 0], "\n".join(
        text[-3000:] for _, *texts in ended for text in texts
    )
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5, atol=1e-5)


def test_nothing_trains_on_where_the_process_that_was_started_is_killed(tiny_model, problems, tmp_path):
    processes = start(tiny_model, problems, tmp_path / "run", 2)
    wait_for_checkpoint(processes, tmp_path / "run")
    children = [child_of(process) for process in processes]
    for process in processes:
        process.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(map(is_running, children)):
        time.sleep(0.05)
    assert not any(map(is_running, children))
    finish(processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_one_process_has_all_save_and_end(number, tiny_model, problems, tmp_path, alone):
    out = tmp_path / "run"
    processes = start(tiny_model, problems, out, 2)
    wait_for_checkpoint(processes, out)
    os.kill(processes[1].pid, number)
    for status, _, complained in finish(processes):
        assert status == 128 + signal.SIGTERM, complained
        assert "go on with --resume" in complained
        assert "Traceback" not in complained
    assert not (out / "report.json").exists()
    if number == signal.SIGINT:  # resumed as after the other
        return
    newest = sorted((out / "checkpoints").iterdir())[-1]
    other = tmp_path / "other"  # what the second process sees: a later checkpoint than the first
    shutil.copytree(out, other)
    shutil.rmtree(newest)
    ended = finish(start(tiny_model, problems, out, 2, "--resume", outs=[out, other]))
    assert [status for status, _, _ in ended] == [0, 0], ended
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5, atol=1e-5)


def test_where_one_cannot_read_the_checkpoint_all_say_so(tiny_model, problems, tmp_path, alone):
    other = tmp_path / "other"
    shutil.copytree(alone, other)
    for run in (other / "checkpoints").glob("step_*/run.json"):
        run.unlink()
    first, second = finish(start(tiny_model, problems, alone, 2, "--resume", outs=[alone, other]))
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert "process 1: " in first[2]
    for _, _, complained in (first, second):
        assert "run.json is missing or damaged" in complained
        assert "Traceback" not in complained


def test_what_the_first_process_complains_of_all_say_and_end(tiny_model, problems, tmp_path, alone):
    for status, _, complained in finish(start(tiny_model, problems, alone, 2)):
        assert status == 2, complained
        (line,) = [line for line in complained.splitlines() if line.startswith("jaxsparse finetune:")]
        assert "holds a run already" in line
        assert "Traceback" not in complained


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "need --coordinator HOST:PORT"),
        (["--coordinator", "localhost:1"], "needs --processes, how many there are, and --process"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2"],
            "process=2 must lie between 0 and 1",
        ),
    ],
)
def test_bad_addresses_end_in_one_line(flags, message, tiny_model, problems, tmp_path):
    command = [sys.executable, "-m", "jaxsparse.cli.main", "finetune", *flags]
    command += arguments(tiny_model, problems, tmp_path / "run", steps=1)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
