"""The demo replaces a demo, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxsparse.cli.main import main
from tests.cli.test_errors import fails


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def demo(model: Path, out: Path, /, **options: Any) -> list[str]:
    given = {"model": model, "out": out, "steps": 2, "batch": 2, "eval-rows": 2, "density": 0.02} | options
    return ["demo", *(f"--{name}={value}" for name, value in given.items())]


def test_a_demo_replaces_a_demo_and_only_when_it_can_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "demo"
    assert main(demo(tiny_model, out)) == 0
    before = contents(out)
    assert len(json.loads(before["train.json"])) == 4
    wrong = {
        "density": 1.5, "steps": 0, "batch": -1, "eval-rows": 0, "lr": "nan", "refresh-every": 0, "model": "smollm9"
    }  # fmt: skip
    for name, value in wrong.items():
        assert name.replace("-", "_") in fails(demo(tiny_model, out, **{name: value}), capsys) or name == "model"
    assert contents(out) == before
    assert main(demo(tiny_model, out, seed=1)) == 0
    assert contents(out)["train.json"] != before["train.json"]


def test_a_folder_of_something_else_is_left_alone(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {problems['train']}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine").write_text("dear")
    before = contents(tmp_path)
    assert "holds something that is no demo" in fails(demo(tiny_model, tmp_path), capsys)
    assert contents(tmp_path) == before
