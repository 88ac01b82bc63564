"""A run that is asked to end saves and says how to go on; checkpoints are written beside training, whole or not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kill_and_resume import KillConfig, run
from jaxsparse import deltas
from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.train import saver as saver_module
from jaxsparse.train.saver import Saver
from jaxsparse.train.stopping import StopRequests
from tests.train.runs import arguments, finetune, metrics_of, weights


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_and_it_resumes_bit_identically(number, tiny_model, problems, tmp_path):
    options = {"steps": 200, "checkpoint-every": 150}
    assert finetune(tiny_model, problems, tmp_path / "whole", **options) == 0
    out = tmp_path / "run"
    command = [sys.executable, "-m", "jaxsparse.cli.main", "finetune", *arguments(tiny_model, problems, out, **options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(metrics_of(out)) >= 5:
            process.send_signal(number)
            break
        time.sleep(0.001)
    _, complained = process.communicate(timeout=120)
    assert process.returncode == 128 + number, complained
    (step,) = [int(path.name.removeprefix("step_")) for path in (out / "checkpoints").iterdir()]
    assert f"stopped by {number.name} after step {step}; go on with --resume" in complained
    assert "Traceback" not in complained
    assert step == len(metrics_of(out)) < 200
    command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics_of(out)] == list(range(1, 201))
    ours, theirs = (weights(tiny_model, folder / "delta") for folder in (out, tmp_path / "whole"))
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path].view(np.uint32), leaf.view(np.uint32), err_msg=path)


def saved_by(saver, step, weight, state):
    saver.save(step, {"w": weight}, state, {"at": step}, {})


@pytest.fixture
def base():
    return {"w": np.zeros((4, 4), np.float32)}


def test_what_is_saved_is_what_was_there_when_it_was_told(base, tmp_path, monkeypatch):
    go = threading.Event()
    real = saver_module.save_checkpoint

    def slowly(*given, **options):
        go.wait(60)
        return real(*given, **options)

    monkeypatch.setattr(saver_module, "save_checkpoint", slowly)
    state = {"moments": np.arange(3.0)}
    with Saver(tmp_path, base, fingerprint(base), keep=2) as saver:
        weight = np.ones((4, 4), np.float32)
        totals = {"retained": [1]}
        saver.save(1, {"w": weight}, state, {"at": {"row": 1}}, totals)
        assert not list(tmp_path.iterdir())  # training goes on meanwhile, and changes what it told
        weight += 1
        state["moments"] += 1
        totals["retained"].append(2)
        go.set()
    delta = deltas.load(tmp_path / "step_00000001" / "delta")
    np.testing.assert_array_equal(deltas.apply(base, delta)["w"], np.ones((4, 4)))
    told = json.loads((tmp_path / "step_00000001" / "run.json").read_text())
    assert told == {"step": 1, "data": {"at": {"row": 1}}, "totals": {"retained": [1]}}


def test_what_was_just_saved_is_kept_beside_a_damaged_later_checkpoint(base, tmp_path):
    """A run that passed over a damaged checkpoint saves one of fewer steps."""
    (tmp_path / "step_00000008").mkdir()
    with Saver(tmp_path, base, fingerprint(base), keep=1) as saver:
        saved_by(saver, 4, base["w"] + 1, {"m": jnp.ones(2)})
        saved_by(saver, 6, base["w"] + 2, {"m": jnp.ones(2)})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step_00000006", "step_00000008"]


def test_one_save_waits_for_the_other_and_errors_come_out(base, tmp_path, monkeypatch):
    def failing(*given, **options):
        raise InputError("the disk is full")

    with Saver(tmp_path, base, fingerprint(base), keep=2) as saver:
        for step in (1, 2, 3):
            saved_by(saver, step, jnp.full((4, 4), float(step)), {"count": jnp.ones(2)})
        saver.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
        monkeypatch.setattr(saver_module, "save_checkpoint", failing)
        saved_by(saver, 4, jnp.ones((4, 4)), {"count": jnp.ones(2)})
        with pytest.raises(InputError, match="the disk is full"):
            saved_by(saver, 5, jnp.ones((4, 4)), {"count": jnp.ones(2)})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    with pytest.raises(InputError, match="the disk is full"), Saver(tmp_path, base, fingerprint(base), keep=2) as saver:
        saved_by(saver, 6, jnp.ones((4, 4)), {"count": jnp.ones(2)})


def test_requests_are_taken_while_entered_and_a_second_interrupt_is_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupted_twice() -> None:
        with StopRequests() as requests:
            assert requests.received is None
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):  # a request that nobody acted on is not lost
        interrupted_twice()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
def test_killed_at_random_moments_it_loses_nothing(tmp_path: Path):
    outcome = run(KillConfig(kills=3, steps=300, seed=int(np.random.default_rng().integers(2**31))), tmp_path)
    assert outcome.kills == 3
    assert (outcome.lost, outcome.torn) == (0, 0)
    assert outcome.same_bits
