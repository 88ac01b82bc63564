"""Config files: any value that a flag can have, flags win, and what is wrong is said in one line."""

from pathlib import Path

import pytest
import yaml

from jaxsparse.cli.arguments import parse
from jaxsparse.cli.finetune import _config_class
from tests.cli.test_errors import fails


def test_bad_config_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "config.yaml"
    assert "cannot read --config" in fails(["finetune", "--config", str(config)], capsys)
    config.write_text("- lr")
    assert "must map option names to values" in fails(["finetune", "--config", str(config)], capsys)
    config.write_text("{")
    assert "no YAML or JSON" in fails(["finetune", "--config", str(config)], capsys)


@pytest.mark.parametrize("value", [["gasdu"], {"name": "gasdu"}, [], {}])
@pytest.mark.parametrize("name", ["method", "lr"])
def test_a_value_must_be_one(name: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({name: value}))
    line = fails(["finetune", "--config", str(config)], capsys)
    assert f"{name} must be one value, got {value!r}" in line


def parsed(tmp_path: Path, options: dict, *flags: str) -> object:
    config = tmp_path / "config.yaml"
    needed = {"model": "m", "data": "d.json", "out": "o"}
    config.write_text(yaml.safe_dump(needed | options))
    return parse(_config_class, "jaxsparse finetune", ["--config", str(config), *flags])


@pytest.mark.parametrize("text", ["-lead", "--lr", "true", "no", "null", "a b", "a=b", "1e-4", ""])
def test_any_text_can_be_a_value(tmp_path: Path, text: str) -> None:
    assert parsed(tmp_path, {"model": text}).base.model == text


def test_files_hold_every_kind_of_value_and_flags_win(tmp_path: Path) -> None:
    options = {"lr": 1e-5, "eval_data": None, "tensorboard": True, "steps": 3, "density": 0.5, "batch-size": 1}
    del options["batch-size"]
    config = parsed(tmp_path, options, "--steps", "4")
    assert (config.inner.lr, config.rows.eval_data, config.run.tensorboard) == (1e-5, None, True)
    assert (config.run.steps, config.chosen_method.density) == (4, 0.5)


@pytest.mark.parametrize("every", [7, "adaptive", "adaptive:0.5:2:9"])
def test_a_period_may_be_a_number_or_a_text(tmp_path: Path, every: object) -> None:
    written = parsed(tmp_path, {"density": 0.5, "refresh_every": every})
    flag = parsed(tmp_path, {"density": 0.5}, "--refresh-every", str(every))
    assert written.chosen_method.refresh_every == flag.chosen_method.refresh_every == every


def test_another_method_leaves_out_the_options_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Only those: what no method knows stays an error."""
    options = {"method": "gasdu", "density": 0.5, "refresh_every": 3, "carry": "slot"}
    config = parsed(tmp_path, options, "--method", "fixed_mask")
    assert (config.method, config.chosen_method.density) == ("fixed_mask", 0.5)
    assert not hasattr(config.chosen_method, "refresh_every")
    with pytest.raises(SystemExit):
        parsed(tmp_path, options | {"refresh": 3}, "--method", "fixed_mask")
    with pytest.raises(SystemExit):
        parsed(tmp_path, options | {"method": "fixed_mask"})
