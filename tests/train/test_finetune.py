"""A whole run on a tiny model: what it leaves behind, and that it can be killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxsparse import deltas
from jaxsparse.cli.main import main
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.models.checkpoints import load


def arguments(model: Path, files: dict[str, Path], out: Path, **options: Any) -> list[str]:
    given = {"model": model, "data": files["train"], "out": out, "density": 0.02, "refresh-every": 3, "steps": 8}
    given |= {"lr": 0.01, "batch": 4, "max-length": 128, "template": "plain", "max-new-tokens": 4} | options
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def finetune(*args: Any, **options: Any) -> int:
    return main(["finetune", *arguments(*args, **options)])


def weights(model: Path, delta: Path) -> dict[str, np.ndarray]:
    base = load(model)
    tuned = deltas.apply(base.params, deltas.load(delta, base=base.params))
    return {path: np.asarray(leaf) for path, leaf in flatten_with_paths(tuned)[0]}


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_a_run_learns_and_reports_what_it_did(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, batching: str, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    options = {"eval-data": problems["held_out"], "steps": 24, "batching": batching, "max-length": 256}
    assert finetune(tiny_model, problems, out, **options) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"] - 0.1
    assert report["bit_identical"] is True
    assert (report["steps"], report["refreshes"], report["skipped"]) == (24, 8, 0)
    assert 0 < report["entries_changed"] <= 8 * report["slots"]
    assert report["slots"] == 2 * (2 * 20 + 2 * 10)  # two layers; q and o of 1024 entries, k and v of 512, at 2 %
    assert 0 < report["retention_mean"] <= 1
    assert report["tokens_per_second"] > 0
    assert report["delta_bytes"] == sum(f.stat().st_size for f in (out / "delta").rglob("*") if f.is_file())

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["step"] - 1 for line in lines if line["refreshed"]] == list(range(0, 24, 3))
    np.testing.assert_allclose([line["learning_rate"] for line in lines], 0.01, rtol=1e-6)
    assert "bit-identical" in capsys.readouterr().out

    delta = deltas.load(out / "delta")
    assert delta.entries == report["entries_changed"]
    assert delta.metadata.base_fingerprint == load(tiny_model).fingerprint
    changed = {path for path, tensor in delta.tensors.items() if tensor.entries}
    assert changed == {f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"}
    predictions = json.loads((out / "predictions_after.json").read_text())
    assert predictions["loss"] == report["loss_after"]
    assert len(predictions["rows"]) == 8


def test_micro_batches_change_nothing_but_rounding(tiny_model: Path, problems: dict[str, Path], tmp_path: Path) -> None:
    for parts in (1, 2):
        assert finetune(tiny_model, problems, tmp_path / str(parts), **{"micro-batches": parts}) == 0
    whole, split = (weights(tiny_model, tmp_path / str(parts) / "delta") for parts in (1, 2))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / str(parts) / "metrics.jsonl").read_text().splitlines()]
        for parts in (1, 2)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for path, leaf in whole.items():
        np.testing.assert_allclose(leaf, split[path], atol=2e-3, err_msg=path)


def test_the_written_config_repeats_the_run_to_the_bit(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    assert finetune(tiny_model, problems, tmp_path / "first", optimizer="adamw", schedule="cosine") == 0
    config = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(config.read_text())["schedule"] == "cosine"
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "second")]) == 0
    first, second = (weights(tiny_model, tmp_path / name / "delta") for name in ("first", "second"))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])


def test_bfloat16_weights_train_through_float32_masters(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    options = {"dtype": "bfloat16", "eval-data": problems["held_out"], "steps": 16, "checkpoint-every": 5}
    assert finetune(tiny_model, problems, tmp_path / "run", **options) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["bit_identical"]
    assert report["loss_after"] < report["loss_before"]


def test_fixed_mask_refreshes_once(tiny_model: Path, problems: dict[str, Path], tmp_path: Path) -> None:
    flags = arguments(tiny_model, problems, tmp_path / "run", method="fixed_mask")
    at = flags.index("--refresh-every")
    assert main(["finetune", *flags[:at], *flags[at + 2 :]]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["refreshes"] == 1
    assert report["entries_changed"] <= report["slots"]


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


def test_the_step_does_not_wait_for_the_host_or_compile_again(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    """Transfers inside the step's own call would raise."""
    import optax

    import jaxsparse as js
    from jaxsparse.data import batches, encode_rows, load_rows
    from jaxsparse.engine.tuner import ReferenceTuner
    from jaxsparse.models.functional import LanguageModel

    base = load(tiny_model)
    examples = encode_rows(load_rows(problems["train"]), base.tokenizer, "plain", 128)
    data = batches(examples, batch_size=4, max_length=128, buckets=[128])
    tuner = ReferenceTuner(LanguageModel(base.config).loss, js.gasdu(optax.adam(1e-2), density=0.02, refresh_every=2))
    state = tuner.init(base.params)
    for _ in range(4):
        batch = jax.device_put(next(data))
        with jax.transfer_guard("disallow"):
            old, (state, _) = state, tuner.step(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))  # donated
    assert tuner.step._cache_size() == 1
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base.params))  # init copied them
