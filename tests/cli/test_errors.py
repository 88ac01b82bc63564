"""Bad input ends in one clear line, exit code 2, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxsparse import deltas
from jaxsparse.cli.main import main
from jaxsparse.common.errors import InputError


def flags(model: Any, files: dict[str, Path], out: Path, **options: Any) -> list[str]:
    given = {"model": model, "data": files["train"], "out": out, "density": 0.02, "steps": 2, "max-length": 128}
    given |= {"template": "plain", "batch": 4} | {name.replace("_", "-"): value for name, value in options.items()}
    return [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Runs a command that must fail, and returns the one line that it says."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, "density must lie in (0, 1], got 1.5"),
        ({"density": None}, "exactly one of density"),
        ({"budget": 1e-3}, "exactly one of density"),
        ({"refresh_every": 0}, "refresh_every must be at least 1 step, got 0"),
        ({"refresh_every": "often"}, "refresh_every must be a whole number of steps, or adaptive:"),
        ({"refresh_every": "adaptive:2"}, "threshold must lie in (0, 1], got 2"),
        ({"targets": "layers/.*/qproj/kernel"}, "near misses: layers/self_attn/q_proj/kernel"),
        ({"targets": "norm/scale"}, "norm/scale is not a matrix"),
        ({"targets": "("}, "no regular expression"),
        ({"method": "gazdu"}, "unknown method 'gazdu'; known methods: "),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epochs": 1}, "steps or epochs, not both"),
        ({"epochs": "inf", "steps": None}, "epochs must be a positive number, got inf"),
        ({"epochs": "nan", "steps": None}, "epochs must be a positive number, got nan"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes must be a positive number"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"lr": 0}, "lr must be a positive number, got 0"),
        ({"lr": "inf"}, "lr must be a positive number, got inf"),
        ({"lr": "nan"}, "lr must be a positive number, got nan"),
        ({"warmup_steps": 3}, "warmup_steps must lie between 0 and the 2 steps"),
        ({"clip": -1}, "clip must be a positive number, or 0 for none, got -1"),
        ({"clip": "nan"}, "clip must be a positive number, or 0 for none, got nan"),
        ({"clip": "inf"}, "clip must be a positive number, or 0 for none, got inf"),
        ({"carry": "reset", "schedule": "linear"}, "carry=reset starts the inner optimizer afresh"),
        ({"carry": "reset", "warmup_steps": 1}, "warmup_steps=1 would start again"),
        ({"weight_decay": 0.1}, "needs --optimizer adamw"),
        ({"method": "spiel", "optimizer": "sgd", "density": None}, "spiel brings its own optimizer"),
        ({"micro_batches": 3}, "micro_batches=3 must divide batch=4"),
        ({"max_length": 512}, "max_length=512 is more than the 256 positions"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"eval_rows": -1}, "eval_rows must be at least 1, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must lie between 1 and 255"),
        ({"max_new_tokens": -1}, "max_new_tokens must lie between 1 and 255"),
        ({"max_new_tokens": 256}, "max_new_tokens must lie between 1 and 255"),
        ({"model": "smollm9"}, "smollm9"),
    ],
)
def test_bad_options(
    tiny_model: Path,
    problems: dict[str, Path],
    tmp_path: Path,
    options: dict,
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    given = {"model": tiny_model, "eval_data": problems["held_out"]} | options
    assert message in fails(["finetune", *flags(given.pop("model"), problems, tmp_path / "run", **given)], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('[\n{"instruction": "a", "input": "", "output": "b", "answer": "b"},\n{"instruction": ""}\n]', "3"),
        ('[\n{"instruction": "a"', "train.json"),
        ("{}", "list"),
    ],
)
def test_bad_rows_are_named_by_line(
    tiny_model: Path, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "train.json"
    data.write_text(text)
    line = fails(["finetune", *flags(tiny_model, {"train": data}, tmp_path / "run")], capsys)
    assert message in line
    assert "train.json" in line
    assert not (tmp_path / "run").exists()


def test_an_answer_that_is_too_long_is_found_before_anything_is_written(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = json.loads(problems["held_out"].read_text())
    rows[2]["answer"] = "12 " * 200
    data = tmp_path / "held_out.json"
    data.write_text(json.dumps(rows))
    line = fails(["finetune", *flags(tiny_model, problems, tmp_path / "run", eval_data=data)], capsys)
    assert "row 3: its answer takes" in line
    assert not (tmp_path / "run").exists()


def test_tensorboard_without_its_package(
    tiny_model: Path,
    problems: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    line = fails(["finetune", *flags(tiny_model, problems, tmp_path / "run"), "--tensorboard"], capsys)
    assert "pip install 'jaxsparse[tensorboard]'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "a[b]/run"])
def test_a_folder_whose_name_is_a_pattern(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    """Orbax would write there without a word and find nothing again."""
    line = fails(["finetune", *flags(tiny_model, problems, tmp_path / name)], capsys)
    assert "give a path without [ ] * ?" in line
    delta = deltas.diff({"kernel": jnp.zeros(3)}, {"kernel": jnp.arange(3.0)})
    with pytest.raises(InputError, match="give a path without"):
        deltas.save(tmp_path / name, delta)
    assert not list(tmp_path.iterdir())


def test_bad_models(tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "--source", str(tiny_model), "--to", "hugging_face", "--out", str(tmp_path / "hf")]) == 0
    model = tmp_path / "hf"
    tokenizer = (model / "tokenizer.json").read_text()
    config = json.loads((model / "config.json").read_text())

    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    line = fails(["finetune", *flags(model, problems, tmp_path / "run")], capsys)
    assert "model-00002-of-00002.safetensors" in line
    (model / "model.safetensors.index.json").unlink()
    (model / "model-00001-of-00002.safetensors").rename(model / "model.safetensors")

    larger = json.loads(tokenizer)
    larger["added_tokens"].append(
        {"id": 9999, "content": "<far>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    )
    (model / "tokenizer.json").write_text(json.dumps(larger))
    line = fails(["finetune", *flags(model, problems, tmp_path / "run")], capsys)
    assert "tokenizer" in line
    assert "vocabulary" in line
    (model / "tokenizer.json").write_text(tokenizer)

    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "layers.2." in fails(["finetune", *flags(model, problems, tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_a_delta_for_another_base_is_refused(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["finetune", *flags(tiny_model, problems, tmp_path / "run")]) == 0
    options = ["--data", str(problems["held_out"]), "--delta", str(tmp_path / "run" / "delta"), "--template", "plain"]
    options += ["--max-length", "128", "--max-new-tokens", "4"]
    assert main(["evaluate", "--model", str(tiny_model), *options]) == 0
    line = fails(["evaluate", "--model", str(tiny_model), "--dtype", "bfloat16", *options], capsys)
    assert "base" in line


def test_a_folder_that_cannot_be_written(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails(["finetune", *flags(tiny_model, problems, tmp_path / "file" / "run")], capsys)
    readonly = Path("/sys/kernel")
    if readonly.is_dir():
        assert "cannot write" in fails(["finetune", *flags(tiny_model, problems, readonly / "jaxsparse")], capsys)


@pytest.mark.parametrize("largest", [2_000, 200])
def test_a_full_disk_leaves_nothing_half_written(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, largest: int
) -> None:
    """No file may grow beyond a limit: the delta, or the very first file, meets an error while being written."""
    out = tmp_path / "run"

    limited = (
        "import resource, signal, sys; from jaxsparse.cli.main import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {largest})); sys.exit(main())"
    )
    command = [sys.executable, "-c", limited, "finetune", *flags(tiny_model, problems, out, density=0.5)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert not (out / "delta").exists()
    assert not (out / "report.json").exists()
    assert not list(out.rglob(".*"))


def test_usage_and_unknown_commands(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert main([]) == 2
    capsys.readouterr()
    assert "unknown command 'tune'" in fails(["tune"], capsys)
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--densty", "1"])
    assert stopped.value.code == 2


def test_json_goes_to_standard_output_alone(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["finetune", *flags(tiny_model, problems, tmp_path / "run"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "report.json").read_text())
    shutil.rmtree(tmp_path / "run")
