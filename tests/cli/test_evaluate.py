"""`jaxsparse evaluate`: what is wrong is found before the measuring."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxsparse.cli import evaluate
from jaxsparse.cli.main import main
from jaxsparse.evaluate import Measurement
from tests.cli.test_errors import fails


def command(model: Path, data: Path, **options: Any) -> list[str]:
    given = {"model": model, "data": data, "rows": 2, "template": "plain", "max-length": 128, "max-new-tokens": 3}
    return ["evaluate", *(f"--{name}={value}" for name, value in (given | options).items())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rows": -3}, "rows must be at least 1, got -3"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max-new-tokens": 0}, "max_new_tokens must lie between 1 and 255"),
        ({"max-new-tokens": 300}, "max_new_tokens must lie between 1 and 255"),
        ({"predictions": "{tmp}/file/predictions.json"}, "cannot write"),
        ({"predictions": "{tmp}"}, "it is a folder"),
    ],
)
def test_bad_options_are_found_before_the_measuring(
    tiny_model: Path,
    problems: dict[str, Path],
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_yet(*_: Any, **__: Any) -> None:
        raise AssertionError("measured first")

    monkeypatch.setattr(evaluate, "measure", not_yet)
    (tmp_path / "file").write_text("")
    given = {name: str(value).replace("{tmp}", str(tmp_path)) for name, value in options.items()}
    assert message in fails(command(tiny_model, problems["held_out"], **given), capsys)


def test_what_is_not_finite_is_null_in_json(
    tiny_model: Path,
    problems: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "measure", lambda *_, **__: Measurement(800.0, 0.5, 2, ("a", "b")))
    out = tmp_path / "new" / "predictions.json"
    assert main([*command(tiny_model, problems["held_out"], predictions=out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"loss": 800.0, "perplexity": None, "exact_match": 0.5, "rows": 2}
    assert [row["prediction"] for row in json.loads(out.read_text())] == ["a", "b"]
    assert main(command(tiny_model, problems["held_out"])) == 0
    assert "inf" in capsys.readouterr().out
