"""`jaxsparse methods` lists every method, and its numbers are those of the method itself on the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import jaxsparse as js
from jaxsparse.cli.main import main
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.methods.registry import METHODS, PAPERS
from jaxsparse.models.checkpoints import load, load_config
from jaxsparse.subspaces.targets import tree_size
from tests.cli.test_errors import fails


def rows(capsys: pytest.CaptureFixture, *flags: str) -> dict[str, dict[str, Any]]:
    assert main(["methods", "--json", *flags]) == 0
    return {row["method"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_method_says_where_it_is_from_and_what_it_trains(capsys: pytest.CaptureFixture) -> None:
    listed = rows(capsys)
    assert list(listed) == list(METHODS)
    assert set(PAPERS) == set(METHODS)
    for name, row in listed.items():
        assert row["paper"] == PAPERS[name]
        assert all(row[field] for field in ("paper", "subspace", "trains", "engine")), name
        assert "_" not in row["subspace"]
        assert (row["trainable"], row["problem"]) == (None, None)
    assert {listed[name]["subspace"] for name in ("gasdu", "shira", "spiel")} == {"coordinates"}
    assert (listed["full"]["subspace"], listed["lisa"]["subspace"]) == ("everything", "layers")
    assert (listed["gasdu"]["budget"], listed["gasdu"]["schedule"]) == ({"density": 1e-4}, {"refresh_every": 50})
    assert listed["gasdu"]["examples"] == ["density"]
    assert listed["cla"]["examples"] == []


def test_every_public_constructor_is_listed() -> None:
    public = {name for name in dir(js) if getattr(getattr(js, name), "__module__", "").startswith("jaxsparse.methods")}
    assert public - {"subspace_descent"} == set(METHODS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_those_of_the_method_on_the_model(
    dtype: str, tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    listed = rows(capsys, "--model", str(tiny_model), "--dtype", dtype)
    params = load(tiny_model, dtype=dtype).params
    size = tree_size(params)
    adam = optax.adam(1e-4)
    known: dict[str, SubspaceTransformation] = {
        "gasdu": js.gasdu(adam, density=1e-4),
        "cla": js.cla(adam, rank=8),
        "lisa": js.lisa(adam),
        "full": js.full(adam),
    }
    for name, method in known.items():
        state = jax.jit(method.init)(params)
        assert listed[name]["state_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state)), name
        assert listed[name]["share"] == listed[name]["trainable"] / size
    # Two layers of 32: q and o are 32 x 32, k and v 32 x 16.
    assert listed["cla"]["trainable"] == 2 * 8 * (32 + 32 + 16 + 16)
    assert listed["gasdu"]["trainable"] == 2 * 4
    assert listed["lisa"]["trainable"] == listed["full"]["trainable"] == size
    troubled = {name: row["problem"] for name, row in listed.items() if row["problem"]}
    assert all(row["trainable"] for name, row in listed.items() if name not in troubled)
    assert set(troubled) <= {"bitfit", "shira"}
    assert "this model has none" in troubled["bitfit"]


def test_the_configuration_alone_is_enough(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(tiny_model, tmp_path / "ours", ignore=shutil.ignore_patterns("params"))
    hugging_face = {"model_type": "gpt2", "vocab_size": 90, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps(hugging_face))
    expected = rows(capsys, "--model", str(tiny_model))
    assert rows(capsys, "--model", str(tmp_path / "ours")) == expected
    listed = rows(capsys, "--model", str(tmp_path))
    assert listed["bitfit"]["trainable"] == 2 * (192 + 64 + 256 + 64 + 2 * 64) + 64
    assert load_config(tmp_path / "config.json") == load_config(tmp_path)


def test_the_table_names_all_methods_and_says_what_does_not_fit(
    tiny_model: Path, capsys: pytest.CaptureFixture
) -> None:
    for flags in ([], ["--model", str(tiny_model)]):
        assert main(["methods", *flags]) == 0
        text = capsys.readouterr().out
        assert all(f" {name} " in text for name in METHODS)
        assert "density=0.0001*" in text
    assert "bitfit: bitfit trains biases" in text


def test_a_model_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no file or folder" in fails(["methods", "--model", str(tmp_path / "none")], capsys)
    assert "config.json" in fails(["methods", "--model", str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert' is not supported" in fails(["methods", "--model", str(tmp_path)], capsys)
