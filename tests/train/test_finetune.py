"""A whole run on a tiny model: what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxsparse import deltas
from jaxsparse.cli.main import main
from jaxsparse.models.checkpoints import load
from tests.train.runs import arguments, finetune, metrics_of, weights


@pytest.fixture(scope="module")
def whole_run(tiny_model: Path, problems: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the reference engine, each batch taken as a whole."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finetune(tiny_model, problems, out, engine="reference") == 0
    return out


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
    assert report["engine"] == "fused"
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


@pytest.mark.parametrize("other", [{"engine": "fused"}, {"engine": "reference", "micro-batches": 2}])
def test_engine_and_micro_batches_change_nothing_but_rounding(
    other: dict, whole_run: Path, tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    assert finetune(tiny_model, problems, tmp_path / "run", **other) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["engine"] == other["engine"]
    losses = [[line["loss"] for line in metrics_of(out)] for out in (whole_run, tmp_path / "run")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    found = weights(tiny_model, tmp_path / "run" / "delta")
    for path, leaf in weights(tiny_model, whole_run / "delta").items():
        np.testing.assert_allclose(leaf, found[path], atol=2e-3, err_msg=path)


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


@pytest.mark.slow
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


def test_a_diverged_run_reports_null(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    options = {"eval-data": problems["held_out"], "eval-rows": 2, "lr": 1e38, "optimizer": "sgd", "clip": 0, "steps": 4}
    assert finetune(tiny_model, problems, tmp_path / "run", **options) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=refuse)
    assert report["loss_after"] is None
    assert report["loss_before"] > 0
    assert "-> not finite" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line, parse_constant=refuse)["loss"] is None for line in lines)
    predictions = json.loads((tmp_path / "run" / "predictions_after.json").read_text(), parse_constant=refuse)
    assert predictions["loss"] is None


def test_long_answers_are_dropped_on_request(tiny_model: Path, problems: dict[str, Path], tmp_path: Path) -> None:
    """The rows that stay keep their own answers and predictions."""
    rows = json.loads(problems["held_out"].read_text())[:4]
    rows[1]["answer"] = "12 " * 200
    data = tmp_path / "held_out.json"
    data.write_text(json.dumps(rows))
    options = {"eval-data": data, "too-long": "drop", "steps": 1}
    with pytest.warns(UserWarning, match="dropped 1 of 4 held-out rows"):
        assert finetune(tiny_model, problems, tmp_path / "run", **options) == 0
    written = json.loads((tmp_path / "run" / "predictions_after.json").read_text())["rows"]
    assert [row["answer"] for row in written] == [rows[at]["answer"] for at in (0, 2, 3)]
