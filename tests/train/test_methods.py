"""Every method trains from the command line."""

import json
from pathlib import Path

import pytest

from experiments.tiny import make_tiny_model
from jaxsparse.cli.main import main
from jaxsparse.methods.overview import overview
from jaxsparse.methods.registry import METHODS

OPTIONS = {
    **dict.fromkeys(("gasdu", "fixed_mask", "sift", "gallop"), ("--density", "0.02")),
    **dict.fromkeys(("cla", "r_cla", "paca", "d_paca"), ("--rank", "2")),
    **dict.fromkeys(("c3la", "r_c3la", "c_paca"), ("--rank", "2", "--chain-every", "5")),
    **dict.fromkeys(("lora", "lora_plus", "asym_lora", "dora", "lora_ga", "lora_one"), ("--rank", "2")),
    **dict.fromkeys(("cola", "rac_lora"), ("--rank", "2", "--chain-every", "5")),
    "shira": ("--rank", "1"),
    "lisa": ("--layers", "1", "--every", "5"),
    "s2ft": ("--output", "0.25", "--down", "0.1", "--score", "product"),
    "smt": ("--blocks", "6", "--size", "8", "--calibration-steps", "2"),
    "spiel": ("--reselect-every", "4", "--accumulation-steps", "2"),
}
# These move every weight of a target by fewer numbers.
DENSE_UPDATES = {"lora", "lora_plus", "cola", "asym_lora", "rac_lora", "dora", "lora_ga", "lora_one"}
ENGINES = {row.method: row.engine for row in overview()}


@pytest.mark.parametrize("method", METHODS)
def test_trains_lowers_the_loss_and_leaves_an_exact_delta(
    method: str, tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    model = tiny_model
    if method == "bitfit":  # the other has no biases
        model = make_tiny_model(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    flags = {"model": model, "data": problems["train"], "out": out, "method": method, "steps": 12, "lr": 0.02}
    flags |= {"batch": 8, "max-length": 128, "template": "plain"}
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["finetune", *given, *OPTIONS.get(method, ())]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["bit_identical"]
    assert report["method"] == method
    engine = "reference" if ENGINES[method] == "reference" else "fused"
    assert report["engine"] == engine
    assert ("running on the reference engine: " in capsys.readouterr().err) == (engine == "reference")
    assert report["entries_changed"] > 0
    if method not in DENSE_UPDATES:
        assert report["entries_changed"] <= report["slots"] * max(report["refreshes"], 1)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < sum(losses[:3])
