"""`jaxsparse plan`: what steps take, where parts add up, and what is said of bad input."""

import json

import jax
import pytest

from jaxsparse.cli import plan
from jaxsparse.cli.main import main
from jaxsparse.common.errors import InputError
from jaxsparse.models.checkpoints import load_config
from jaxsparse.plan.absent import absent_devices
from tests.cli.test_errors import fails

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture
def model(tmp_path):
    """A configuration alone: no weights are read."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


def planned(model, capsys, *flags, status=0):
    capsys.readouterr()
    density = [] if "--method" in flags else ["--density", "0.01"]
    given = ["plan", "--model", model, *density, "--batch", "8", "--max-length", "64", "--json", *flags]
    assert main(given) == status
    return json.loads(capsys.readouterr().out)


def there(device):
    """Skips where the compiler for a device is not installed."""
    try:
        absent_devices(device)
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("device", ["cpu", "h100", "v5e"])
def test_parts_add_up_and_full_takes_most(device, model, capsys):
    there(device)
    said = planned(model, capsys, "--device", device)
    plans = {row["method"]: row for row in said["plans"]}
    assert list(plans) == ["gasdu", "full", "lora"]
    for row in plans.values():
        assert row["peak"] == row["weights"] + row["optimizer"] + row["activations"] + row["temporaries"]
        assert row["temporaries"] > 0
        assert row["fits"]
        assert row["refresh_flops"] >= row["flops"] > 0
    weights = plans["gasdu"]["weights"]
    assert weights == 2 * (2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 96 * 64 + 64)
    assert plans["full"]["optimizer"] > 6 * weights - 100
    # Moments and masters, gradient and weight, each read and written.
    assert plans["full"]["bytes"] > 2 * plans["full"]["optimizer"] + 4 * weights
    assert plans["gasdu"]["optimizer"] < 0.2 * weights
    assert plans["gasdu"]["flops"] < 0.9 * plans["full"]["flops"]
    slots = 2 * 4 * round(0.01 * 64 * 64)
    assert plans["gasdu"]["delta_bytes"] == round(2.75 * slots)
    assert (plans["gasdu"]["seconds"] > 0) == (device != "cpu")


def test_activations_are_what_the_layers_keep_and_grow_with_rows_and_without_remat(model, capsys):
    def gasdu(*flags):
        return planned(model, capsys, "--device", "cpu", "--compare", *flags)["plans"][0]

    full, none = gasdu("--remat", "full"), gasdu("--remat", "none")
    assert full["activations"] == 2 * 8 * 64 * 64 * 2  # the input of each of two layers: rows, tokens, width, bytes
    assert none["activations"] > 5 * full["activations"]
    twice = gasdu("--remat", "full", "--batch", "16")
    assert twice["activations"] == pytest.approx(2 * full["activations"], rel=1e-3)
    assert twice["peak"] - full["peak"] >= full["activations"]
    parts = gasdu("--remat", "none", "--micro-batches", "4")
    assert parts["peak"] < none["peak"]
    assert parts["activations"] == pytest.approx(none["activations"] / 4, rel=0.1)


@pytest.mark.parametrize(("device", "mesh"), [("v5e-8", "data=2,fsdp=2,tensor=2"), ("h100x8", None)])
def test_several_devices_share_the_weights(device, mesh, model, capsys):
    there(device)
    flags = ["--device", device, "--compare", "lora", *(["--mesh", mesh] if mesh else [])]
    said = planned(model, capsys, *flags)
    alone = 2 * (2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 96 * 64)
    norms = 2 * (2 * 2 * 64 + 64)
    for row in said["plans"]:
        assert row["problem"] is None
        parts = 4 if mesh else 8
        assert row["weights"] == alone / parts + norms


def test_the_largest_batch_that_fits_is_found(model, capsys, monkeypatch):
    tried = []

    def fits(config, what):
        tried.append(config.batch)
        return config.batch <= 11

    monkeypatch.setattr(plan, "_fits", fits)
    said = planned(model, capsys, "--device", "cpu", "--fit", "batch", "--compare")
    assert said["batch"] == 11
    assert max(tried) == 16
    assert len(tried) == len(set(tried))


def test_the_longest_rows_and_the_fastest_remat_that_fit_are_found(model, capsys, monkeypatch):
    monkeypatch.setattr(plan, "_fits", lambda config, what: config.max_length <= 300)
    assert planned(model, capsys, "--device", "cpu", "--fit", "max-length", "--compare")["max_length"] == 256
    monkeypatch.setattr(plan, "_fits", lambda config, what: config.remat != "none")
    assert planned(model, capsys, "--device", "cpu", "--fit", "remat", "--compare")["remat"] == "dots"
    monkeypatch.setattr(plan, "_fits", lambda config, what: False)
    flags = ["plan", "--model", model, "--density", "0.01", "--device", "cpu"]
    assert "no remat fits in cpu" in fails([*flags, "--fit", "remat"], capsys)
    assert "not even batch=1 fits in cpu" in fails([*flags, "--fit", "batch"], capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "a100"], "device 'a100' is unknown; known: h100, v5e, v5p, cpu"),
        (["--device", "v5e-6"], "v5e is to be had with 4, 8, 16, 32, 64, 128, 256 chips"),
        (["--device", "h100x9"], "GPUs come singly up to 8, then in multiples of 8"),
        (["--device", "cpux2"], "there is one CPU"),
        (["--batch", "0"], "batch must be at least 1"),
        (
            ["--batch", "1000000000000"],
            "batch=1000000000000 is too large to be planned at max_length=768; at most 2796202",
        ),
        (["--micro-batches", "3"], "it must be a multiple of 3, such as 3"),
        (["--device", "v5e-8", "--batch", "12"], "it must be a multiple of 8, such as 8"),
        (["--compare", "nothing"], "unknown method 'nothing'"),
        (["--budget", "0.1"], "density"),
        (["--max-length", "2000"], "max_length=2000 is more than the 1024 positions of"),
        (["--device", "v5e-8", "--mesh", "fsdp=3"], "has 3 devices, but there are 8"),
        (["--device", "v5e-8", "--mesh", ""], "mesh axis '' is unknown"),
        (["--model", "nope"], "there is no file or folder nope"),
        (["--method", "nope"], "unknown method 'nope'"),
        (["--density", "2", "--device", "cpu"], "density must lie in (0, 1], got 2"),
        (["--max-length", "0"], "max_length must be at least 1, got 0"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, model, capsys):
    assert message in fails(["plan", "--model", model, "--density", "0.01", *flags], capsys)


def test_sizes_that_divide_a_weight_are_named(capsys):
    there("v5e-32")
    given = ["plan", "--model", "gpt2", "--density", "0.01", "--device", "v5e-32", "--mesh", "tensor=32", "--compare"]
    message = fails(given, capsys)
    assert "wte/embedding has an axis of 50257, which 32 devices cannot share equally along tensor" in message
    assert message.endswith("sizes that work: 1, 29")


def test_what_a_method_cannot_do_is_said_of_it_alone(model, capsys):
    said = planned(model, capsys, "--device", "cpu", "--compare", "smt")
    problems = {row["method"]: row["problem"] for row in said["plans"]}
    assert problems["gasdu"] is None
    assert problems["smt"]
    message = fails(["plan", "--model", model, "--density", "0.01", "--device", "cpu", "--mesh", "data=2"], capsys)
    assert "but there are 1; data=1 would work" in message


def test_a_table_is_for_people(model, capsys):
    assert main(["plan", "--model", model, "--density", "0.01", "--device", "cpu", "--compare", "lora"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("on cpu: 4 rows of 768 tokens", "peak GB", "gasdu", "lora", "tokens/s at most"):
        assert part in text
    assert load_config(model).hidden_size == 64
    assert jax.default_backend() == "cpu"
