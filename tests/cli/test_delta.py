"""`jaxsparse delta`: deltas of tiny models made, described, applied, reverted and mixed; bad input leaves nothing."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsparse import deltas
from jaxsparse.cli.main import main
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.models.checkpoints import load, save
from jaxsparse.subspaces.targets import matrix_view
from tests.cli.test_errors import fails
from tests.deltas.models import assert_same_bits, assert_same_delta, with_factors

DOWN, QUERY = ("layers", "mlp", "down_proj", "kernel"), ("layers", "self_attn", "q_proj", "kernel")


def leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def moved(rng: np.random.Generator, params: Any, path: tuple[str, ...], index: Any) -> Any:
    """A copy of the parameters in which a part of one tensor has moved."""
    tree = jax.tree.map(lambda x: x, params)
    parent = leaf(tree, path[:-1])
    part = parent["kernel"][index]
    parent["kernel"] = parent["kernel"].at[index].add(jnp.asarray(rng.normal(size=part.shape) + 3, part.dtype))
    return tree


@pytest.fixture
def pair(tiny_model: Path, tmp_path: Path, rng: np.random.Generator) -> tuple[Any, Any, Path]:
    """The tiny model, its parameters with two channels of `down_proj` and a few entries of `q_proj` moved, and a folder
    that holds that model."""
    base = load(tiny_model)
    params = moved(rng, moved(rng, base.params, DOWN, (slice(None), jnp.array([3, 17]))), QUERY, (1, 4, 5))
    save(tmp_path / "tuned", base.config, params, base.tokenizer, "tuned")
    return base, params, tmp_path / "tuned"


def says(arguments: list[Any], capsys: pytest.CaptureFixture) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main(["delta", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("form", ["delta", "delta.safetensors"])
def test_diff_apply_and_revert(
    form: str, pair: tuple[Any, Any, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, params, tuned = pair
    out = tmp_path / "run" / form
    said = says(["diff", "--base", tiny_model, "--tuned", tuned, "--out", out], capsys)
    delta = deltas.load(out, base=base.params)
    assert (said["entries"], said["tensors"], said["kinds"]) == (delta.entries, 2, ["coordinates", "slices"])
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    assert said["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    assert said["bytes_per_entry"] == said["bytes_on_disk"] / delta.entries
    assert delta.metadata.base_name == "tiny"

    said = says(["apply", "--model", tiny_model, "--delta", out, "--out", tmp_path / "again"], capsys)
    again = load(tmp_path / "again")
    assert_same_bits(again.params, params)
    assert (said["fingerprint"], said["name"]) == (fingerprint(params), "tiny+run")
    assert again.tokenizer is not None

    said = says(["revert", "--model", tuned, "--delta", out, "--out", tmp_path / "base"], capsys)
    assert_same_bits(load(tmp_path / "base").params, base.params)
    assert (said["is_base"], said["name"]) == (True, "tiny")


def test_a_model_that_moved_elsewhere_too_is_not_called_the_base(
    pair: tuple[Any, Any, Path], tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture
) -> None:
    base, params, _ = pair
    deltas.save(tmp_path / "delta", deltas.diff(base.params, params))
    both = moved(rng, params, ("layers", "mlp", "up_proj", "kernel"), (0, 0))
    save(tmp_path / "both", base.config, both, base.tokenizer, "both")
    capsys.readouterr()
    arguments = ["--model", tmp_path / "both", "--delta", tmp_path / "delta", "--out", tmp_path / "other"]
    assert main(["delta", "revert", *map(str, arguments)]) == 0
    assert "is base no" in capsys.readouterr().out


def test_models_as_hugging_face_has_them(
    pair: tuple[Any, Any, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, params, _ = pair
    deltas.save(tmp_path / "delta", deltas.diff(base.params, params))
    arguments = ["--delta", tmp_path / "delta", "--to", "hugging_face", "--out"]
    said = says(["apply", "--model", tiny_model, *arguments, tmp_path / "there"], capsys)
    assert said["fingerprint"] == fingerprint(params)
    assert_same_bits(load(tmp_path / "there").params, params)
    says(["revert", "--model", tmp_path / "there", *arguments, tmp_path / "back"], capsys)
    assert_same_bits(load(tmp_path / "back").params, base.params)


def test_a_delta_brings_its_dtype(
    pair: tuple[Any, Any, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, _, tuned = pair
    out = tmp_path / "delta"
    says(["diff", "--base", tiny_model, "--tuned", tuned, "--out", out, "--dtype", "bfloat16"], capsys)
    says(["apply", "--model", tiny_model, "--delta", out, "--out", tmp_path / "narrow"], capsys)
    assert_same_bits(load(tmp_path / "narrow").params, load(tuned, dtype="bfloat16").params)
    says(["mix", "--model", tiny_model, "--delta", out, "--out", tmp_path / "mixed"], capsys)
    mixed = deltas.load(tmp_path / "mixed")
    assert_same_bits(deltas.apply(load(tiny_model, dtype="bfloat16").params, mixed), load(tmp_path / "narrow").params)


def test_low_rank_deltas_need_their_base_to_revert(
    tiny_model: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture
) -> None:
    base = load(tiny_model)
    weight = leaf(base.params, QUERY)
    factors = {"/".join(QUERY): with_factors(rng, weight, matrix_view(weight.shape, (0,), (1,), (2,)))}
    delta = deltas.diff(base.params, base.params, factors=factors)
    deltas.save(tmp_path / "delta", delta)
    params = deltas.apply(base.params, delta)
    says(["apply", "--model", tiny_model, "--delta", tmp_path / "delta", "--out", tmp_path / "tuned"], capsys)
    assert_same_bits(load(tmp_path / "tuned").params, params)
    arguments = ["revert", "--model", tmp_path / "tuned", "--delta", tmp_path / "delta", "--out", tmp_path / "base"]
    assert "low-rank factors, out of which no base comes back: give --base" in fails(
        ["delta", *map(str, arguments)], capsys
    )
    assert not (tmp_path / "base").exists()
    assert says([*arguments, "--base", tiny_model], capsys)["is_base"]
    assert_same_bits(load(tmp_path / "base").params, base.params)


def test_an_adapter_goes_out_for_peft_and_comes_back(
    tiny_model: Path, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture
) -> None:
    base = load(tiny_model)
    weights = {path: leaf(base.params, path) for path in (DOWN, QUERY)}
    views = {path: matrix_view(weight.shape, (0,), (1,), (2,)) for path, weight in weights.items()}
    factors = {"/".join(QUERY): with_factors(rng, weights[QUERY], views[QUERY])}
    params = moved(rng, base.params, DOWN, (slice(None), jnp.array([3, 17])))
    delta = deltas.diff(base.params, params, slices={"/".join(DOWN): views[DOWN]}, factors=factors)
    deltas.save(tmp_path / "delta", delta)
    arguments = ["--delta", tmp_path / "delta", "--model", tiny_model, "--base-name", "someone/tiny"]
    says(["export", *arguments, "--to", "peft", "--out", tmp_path / "adapter"], capsys)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "someone/tiny"
    assert settings["target_modules"] == ["mlp.down_proj", "self_attn.q_proj"]
    arguments = ["--from-peft", tmp_path / "adapter", "--model", tiny_model, "--out", tmp_path / "again"]
    said = says(["import", *arguments], capsys)
    again = deltas.load(tmp_path / "again", base=base.params)
    assert (said["kinds"], said["entries"]) == (["factors", "slices"], again.entries)
    assert again.metadata.base_name == "tiny"
    for ours, other in zip(*(jax.tree.leaves(deltas.apply(base.params, d)) for d in (again, delta)), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-6)


def test_entries_and_merged_models_go_out(
    pair: tuple[Any, Any, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, params, _ = pair
    deltas.save(tmp_path / "delta", deltas.diff(base.params, params))
    arguments = ["export", "--delta", tmp_path / "delta", "--model", tiny_model, "--to"]
    says([*arguments, "entries", "--out", tmp_path / "entries.safetensors"], capsys)
    held = safetensors.numpy.load_file(tmp_path / "entries.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    # Hugging Face's weight is (out, in); the entry that moved is at input 4, output 5.
    assert held[f"{name}.index"].tolist() == [5 * leaf(params, QUERY).shape[1] + 4]
    assert held[f"{name}.new"].tolist() == [leaf(params, QUERY)[1, 4, 5]]
    assert held[f"{name}.old"].tolist() == [leaf(base.params, QUERY)[1, 4, 5]]
    says([*arguments, "hugging_face", "--out", tmp_path / "merged"], capsys)
    assert_same_bits(load(tmp_path / "merged").params, params)


def test_mix_is_that_of_python(
    pair: tuple[Any, Any, Path],
    tiny_model: Path,
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture,
) -> None:
    base, params, _ = pair
    named = {"math": params, "code": moved(rng, base.params, QUERY, (slice(None), 4)), "c": params}
    loaded = {name: deltas.diff(base.params, tuned, base_name="tiny") for name, tuned in named.items()}
    for name, delta in loaded.items():
        deltas.save(tmp_path / name / "delta", delta)
    given = ["--delta", tmp_path / "math" / "delta", tmp_path / "code" / "delta", "--delta", f"c={tmp_path}/c/delta"]
    out = tmp_path / "mixed.safetensors"
    options = {"weights": [0.5, 1.0, -1.0], "how": "dare_ties", "density": 0.7, "seed": 5}
    flags = ["--weights", 0.5, 1, -1, "--how", "dare_ties", "--density", 0.7, "--seed", 5]
    said = says(["mix", "--model", tiny_model, *given, *flags, "--out", out], capsys)
    expected = deltas.mix(loaded, base=base.params, **options)
    assert_same_delta(deltas.load(out), expected)
    assert said["entries"] == expected.entries
    assert expected.metadata.options["deltas"] == ["math", "code", "c"]
    clash = ["delta", "mix", "--model", tiny_model, *given, "--overlap", "error", "--out", tmp_path / "x"]
    assert "both move" in fails([str(part) for part in clash], capsys)
    assert not (tmp_path / "x").exists()


def test_info_tells_what_python_does(
    pair: tuple[Any, Any, Path], tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture
) -> None:
    base, params, _ = pair
    view = {"/".join(DOWN): matrix_view(leaf(base.params, DOWN).shape, (0,), (1,), (2,))}
    first = deltas.diff(base.params, params, slices=view, method="s2ft", options={"x": "[bold]"}, base_name="tiny")
    weight = leaf(base.params, QUERY)
    low = with_factors(rng, weight, matrix_view(weight.shape, (0,), (1,), (2,)))
    second = deltas.diff(base.params, base.params, factors={"/".join(QUERY): low}, method="lora")
    paths = [tmp_path / "a" / "delta", tmp_path / "b" / "delta"]
    for path, delta in zip(paths, (first, second), strict=True):
        deltas.save(path, delta)
    said = says(["info", *paths, "--picture", tmp_path / "changes.png"], capsys)
    assert said["overlap"] == deltas.overlap({"a": first, "b": second})
    assert said["overlap"][0]["shared"] == 1
    assert said["deltas"]["a"].items() >= deltas.describe(first).items()
    assert said["deltas"]["b"]["on_disk"]["bytes_per_entry"] > 0
    assert (tmp_path / "changes.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "changes.csv").read_text().splitlines()) == 1 + 2 * 2 + 2

    assert main(["delta", "info", *map(str, paths)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        f"{first.entries:,} weights change, in 2 tensors",
        "bytes per entry",
        "s2ft",
        "x=[bold]",
        "tiny, fingerprint " + base.fingerprint[:16],
        "2 input slices",
        "factors of rank 2",
        "a and b",
        "0-1",
    ):
        assert part in text, part
    assert main(["delta", "info", str(paths[0])]) == 0
    assert "weights in common" not in capsys.readouterr().out


def test_a_delta_without_entries_has_a_size_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = {"w": jnp.zeros(3)}
    deltas.save(tmp_path / "empty", deltas.diff(base, base))
    assert says(["info", tmp_path / "empty"], capsys)["deltas"]["empty"]["on_disk"]["bytes_per_entry"] is None
    assert main(["delta", "info", str(tmp_path / "empty")]) == 0
    assert "0 weights change" in capsys.readouterr().out


SUBCOMMANDS = ("info", "diff", "apply", "revert", "mix", "export", "import")


def test_help_teaches_by_an_example(capsys: pytest.CaptureFixture) -> None:
    assert main(["delta", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in SUBCOMMANDS)
    assert main(["delta"]) == 2
    capsys.readouterr()
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main(["delta", name, "--help"])
        assert stopped.value.code == 0
        assert f"Example: jaxsparse delta {name}" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "unknown subcommand 'merge'; subcommands: info, diff" in fails(["delta", "merge"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info"], "give at least one delta"),
        (["info", "{tmp}/none"], "there is no delta at"),
        (["info", "{tmp}/file"], "not a safetensors file"),
        (["info", "a={tmp}/good", "a={tmp}/good"], "two deltas have the name 'a'"),
        (["info", "{tmp}/good", "--picture", "{tmp}/x.jpg"], "must end in .png"),
        (["info", "{tmp}/good", "--picture", "{tmp}/file/x.png"], "cannot write"),
        (["apply", "--model", "{model}", "--delta", "{tmp}/none", "--out", "{tmp}/x"], "there is no delta at"),
        (["apply", "--model", "{tmp}/none", "--delta", "{tmp}/good", "--out", "{tmp}/x"], "there is no file or folder"),
        (["apply", "--model", "{model}", "--delta", "{tmp}/good", "--out", "{tmp}/x"], "belongs to another base"),
        (["apply", "--model", "{model}", "--delta", "{tmp}/good", "--out", "{tmp}/full"], "is there already"),
        (["revert", "--model", "{model}", "--delta", "{tmp}/good", "--out", "{tmp}/file"], "is there already"),
        (["diff", "--base", "{model}", "--tuned", "{model}", "--out", "{tmp}/file/x"], "cannot write"),
        (
            ["export", "--delta", "{tmp}/good", "--model", "{model}", "--to", "peft", "--out", "{tmp}/x"],
            "belongs to another base",
        ),
        (
            ["export", "--delta", "{tmp}/good", "--model", "{model}", "--to", "entries", "--out", "{tmp}/x"],
            "must end in .safetensors",
        ),
        (["import", "--from-peft", "{tmp}/full", "--model", "{model}", "--out", "{tmp}/x"], "adapter_config.json"),
        (["mix", "--model", "{model}", "--delta", "--out", "{tmp}/x"], "give at least one --delta"),
        (
            ["mix", "--model", "{model}", "--delta", "{tmp}/good", "--weights", "1", "2", "--out", "{tmp}/x"],
            "weights must be one for each of the 1 deltas, got 2",
        ),
        (["mix", "--model", "{model}", "--delta", "{tmp}/good", "--out", "{tmp}/x"], "cannot mix delta good"),
        (
            ["mix", "--model", "{model}", "--delta", "{tmp}/good", "--how", "ties", "--out", "{tmp}/x"],
            "how='ties' needs a density",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    arguments: list[str], message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    deltas.save(tmp_path / "good", deltas.diff({"w": jnp.zeros(3)}, {"w": jnp.arange(3.0)}))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    given = [part.replace("{tmp}", str(tmp_path)).replace("{model}", str(tiny_model)) for part in arguments]
    assert message in fails(["delta", *given], capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "full", "good"]


def test_overwriting_is_asked_for(
    pair: tuple[Any, Any, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _, params, tuned = pair
    arguments = ["diff", "--base", tiny_model, "--tuned", tuned, "--out", tmp_path / "delta"]
    for _ in range(2):
        says([*arguments, "--overwrite"], capsys)
    assert "--overwrite" in fails(["delta", *map(str, arguments)], capsys)
    arguments = ["apply", "--model", tiny_model, "--delta", tmp_path / "delta", "--out", tuned]
    says([*arguments, "--overwrite"], capsys)
    assert_same_bits(load(tuned).params, params)


def test_paths_may_go_up_and_be_here(
    pair: tuple[Any, Any, Path],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, params, _ = pair
    deltas.save(tmp_path / "v1.5" / "delta", deltas.diff(base.params, params))
    deltas.save(tmp_path / "v1.6" / "delta", deltas.diff(base.params, params))
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert list(says(["info", "../v1.5/delta", "../v1.6/delta"], capsys)["deltas"]) == ["v1.5", "v1.6"]
    says(["apply", "--model", tiny_model, "--delta", "../v1.5/delta", "--out", "../there"], capsys)
    assert_same_bits(load("../there").params, params)
    monkeypatch.chdir(tmp_path / "v1.5" / "delta")
    assert list(says(["info", "."], capsys)["deltas"]) == ["v1.5"]
    assert f"{tmp_path / 'v1.5' / 'delta'} is one" in fails(["delta", "info", str(tmp_path / "v1.5")], capsys)


def test_overwriting_spares_what_is_no_delta_and_what_is_read(
    pair: tuple[Any, Any, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, params, _ = pair
    deltas.save(tmp_path / "run" / "delta", deltas.diff(base.params, params))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("hi")
    flags = ["delta", "mix", "--model", str(tiny_model), "--delta", str(tmp_path / "run" / "delta"), "--overwrite"]
    for out, message in (("mine", "it is no delta, model or adapter"), ("run", "it holds"), ("run/delta", "it holds")):
        assert message in fails([*flags, "--out", str(tmp_path / out)], capsys)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "hi"
    assert deltas.load(tmp_path / "run" / "delta").entries
    says([*flags[1:-1], "--out", tmp_path / "mixed"], capsys)
    says([*flags[1:], "--out", tmp_path / "mixed"], capsys)
