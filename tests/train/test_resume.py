"""A run that was killed goes on as if nothing had happened, or says why it cannot."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.cli.main import main
from jaxsparse.data import batches, encode_rows, load_rows
from jaxsparse.engine.preparation import prepared
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.train.config import RunConfig
from jaxsparse.train.loop import train
from jaxsparse.train.stopping import StopRequests
from tests.train.runs import arguments, finetune, metrics_of, weights


@pytest.mark.slow
def test_resumes_bit_identically_after_sigkill_at_a_random_step(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    options = {"steps": 30, "checkpoint-every": 4, "method": "gasdu", "schedule": "linear"}
    assert finetune(tiny_model, problems, tmp_path / "whole", **options) == 0

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "jaxsparse.cli.main", "finetune", *arguments(tiny_model, problems, out, **options)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ})
    kill_at = random.randint(9, 26)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"the run ended before step {kill_at} could be seen"
    assert not (out / "report.json").exists()

    assert finetune(tiny_model, problems, out, **options) == 2  # without --resume nothing is overwritten
    flags = arguments(tiny_model, problems, out, **options)
    assert main(["finetune", *flags, "--resume"]) == 0
    whole, resumed = (weights(tiny_model, tmp_path / name / "delta") for name in ("whole", "killed"))
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf.view(np.uint32), resumed[path].view(np.uint32), err_msg=path)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert [(line["step"], line["loss"]) for line in lines[0]] == [(line["step"], line["loss"]) for line in lines[1]]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0]["retention_mean"] == reports[1]["retention_mean"]


def test_a_damaged_checkpoint_is_reported_and_passed_over(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    options = {"steps": 9, "checkpoint-every": 4}
    assert finetune(tiny_model, problems, tmp_path / "whole", **options) == 0
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_00000004", "step_00000008"]
    before = weights(tiny_model, tmp_path / "whole" / "delta")
    (checkpoints[1] / "run.json").write_text("{")
    flags = [*arguments(tiny_model, problems, tmp_path / "whole", **options), "--resume"]
    with pytest.warns(UserWarning, match=r"passed over.*step_00000008"):
        assert main(["finetune", *flags]) == 0
    for path, leaf in weights(tiny_model, tmp_path / "whole" / "delta").items():
        np.testing.assert_array_equal(leaf, before[path])


@pytest.mark.parametrize("name", ["gasdu", "lora_ga"])
def test_a_resumed_run_is_the_whole_run_and_compiles_its_step_once(
    name: str, tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    """LoRA-GA's frozen weights differ from the base before its first step."""
    base = load(tiny_model)
    examples = encode_rows(load_rows(problems["train"]), base.tokenizer, "plain", 128)
    loss = LanguageModel(base.config).loss

    def data() -> Any:
        return batches(examples, batch_size=4, max_length=128, mode="packed")  # packed: all of one shape

    if name == "gasdu":
        method = js.gasdu(optax.adam(1e-2), density=0.02, refresh_every=3)
    else:
        method = prepared(loss, base.params, [next(data())], js.lora_ga(optax.adam(1e-2), rank=2))
    tuner = js.fuse(loss, method, has_aux=True)

    def run(out: Path, steps: int, **options: bool) -> Any:
        options = {"steps": steps, "checkpoint_every": 2, **options}
        params = load(tiny_model).params
        told = {"rate": lambda step: 0.01, "base_fingerprint": base.fingerprint}
        out.mkdir(exist_ok=True)
        state, _ = train(tuner, params, data(), RunConfig(out, **options), steps, **told)
        return tuner.params(state)

    whole, broken = run(tmp_path / "whole", 5), tmp_path / "broken"
    run(broken, 3)
    leftover = broken / "checkpoints" / ".step_00000004.k1lled"
    leftover.mkdir()
    (leftover / "run.json").write_text("{")
    jax.tree.map(np.testing.assert_array_equal, run(broken, 5, resume=True), whole)
    assert tuner.step._cache_size() == 1
    assert [line["step"] for line in metrics_of(broken)] == [1, 2, 3, 4, 5]
    assert metrics_of(broken)[-1]["loss"] == metrics_of(tmp_path / "whole")[-1]["loss"]
    assert sorted(path.name for path in (broken / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


@pytest.fixture(scope="module")
def finished(tiny_model: Path, problems: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose last checkpoint is of step 4; `again` copies it."""
    out = tmp_path_factory.mktemp("finished")
    data = {"train": out / "train.json"}
    shutil.copy(problems["train"], data["train"])
    options = {"eval-data": problems["held_out"], "eval-rows": 2, "steps": 5, "checkpoint-every": 4}
    assert finetune(tiny_model, data, out / "run", **options) == 0
    return out


@pytest.fixture
def again(
    finished: Path, tiny_model: Path, problems: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """The folder of a fresh copy of a finished run, and the command line that resumes it."""
    copy = finished.with_name(finished.name + "_copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished, copy)
    options = {"eval-data": problems["held_out"], "eval-rows": 2, "steps": 5, "checkpoint-every": 4}
    given = arguments(tiny_model, {"train": finished / "train.json"}, copy / "run", **options)
    return copy / "run", ["finetune", *given, "--resume"]


def test_a_finished_run_can_be_resumed(finished: Path, again: tuple[Path, list[str]]) -> None:
    """Even where a crash has damaged what is only told, not needed."""
    out, command = again
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    (out / "predictions_before.json").write_text('{"loss": 1.0, "rows": [')
    assert main(command) == 0
    assert [line["step"] for line in metrics_of(out)] == [1, 5]
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (finished / "run", out))
    changing = {"tokens_per_second", "delta", "delta_bytes"}
    assert {name: first[name] for name in first if name not in changing} == {
        name: second[name] for name in second if name not in changing
    }
    assert not {"resume", "json"} & set((out / "config.yaml").read_text().replace(":", " ").split())


def test_a_run_goes_on_with_its_engine(again: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    """The engines keep different states."""
    assert main([*again[1], "--engine", "reference"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "was run with engine='fused', not 'reference'; resume with the same options" in line


@pytest.mark.parametrize("text", ["", "{", "- 1", "lr: [", "\0"])
def test_a_damaged_config_is_named(text: str, again: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    out, command = again
    (out / "config.yaml").write_text(text)
    assert main(command) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "config.yaml is damaged" in line
    assert (out / "config.yaml").read_text() == text


def test_changed_data_is_refused(finished: Path, again: tuple[Path, list[str]], capsys: pytest.CaptureFixture) -> None:
    _, command = again
    data = finished / "train.json"
    before = data.read_text()
    try:
        data.write_text(before.replace("How many", "How  many", 1))
        assert main(command) == 2
    finally:
        data.write_text(before)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "train.json has changed since the run" in line


def test_what_tensor_shards_picked_does_not_go_to_other_shards(
    again: tuple[Path, list[str]], capsys: pytest.CaptureFixture
) -> None:
    out, command = again
    config = (out / "config.yaml").read_text()
    assert "mesh: null" in config
    (out / "config.yaml").write_text(config.replace("mesh: null", "mesh: fsdp=2,tensor=2"))
    assert main(command) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "was run with tensor=2, whose shards each picked their own entries, not tensor=1; resume with" in line


def test_an_option_that_is_younger_than_the_run_was_at_its_default(
    again: tuple[Path, list[str]], capsys: pytest.CaptureFixture
) -> None:
    out, command = again
    lines = (out / "config.yaml").read_text().splitlines(keepends=True)
    (out / "config.yaml").write_text("".join(line for line in lines if not line.startswith(("selection:", "remat:"))))
    assert main([*command, "--remat", "full"]) == 2
    assert "was run with remat='none', not 'full'" in capsys.readouterr().err
    assert main(command) == 0


def test_a_signal_during_the_last_step_ends_the_run_before_it_is_measured(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 3, "eval-data": problems["held_out"], "eval-rows": 2}
    with monkeypatch.context() as patched:
        patched.setattr(StopRequests, "at", lambda self, step: signal.SIGTERM if step == 3 else None)
        assert finetune(tiny_model, problems, tmp_path / "run", **options) == 128 + signal.SIGTERM
    assert not (tmp_path / "run/report.json").exists()
    given = arguments(tiny_model, problems, tmp_path / "run", **options)
    assert main(["finetune", *given, "--resume"]) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    assert finetune(tiny_model, problems, tmp_path / "whole", **options) == 0
    ours, theirs = (weights(tiny_model, tmp_path / name / "delta") for name in ("run", "whole"))
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path].view(np.uint32), leaf.view(np.uint32), err_msg=path)
