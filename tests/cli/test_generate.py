"""`jaxsparse generate`: every request is answered by its own delta."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsparse import deltas
from jaxsparse.cli.main import main
from jaxsparse.data.examples import encode_prompt
from jaxsparse.data.rows import Row
from jaxsparse.deltas import save
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate
from tests.cli.test_errors import fails
from tests.deltas.adapters import adapter


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Saved deltas of two kinds, one in either form, and the tuned models by name."""
    folder, rng = tmp_path_factory.mktemp("deltas"), np.random.default_rng()
    checkpoint = load(tiny_model, dtype="float32")
    found = {}
    for name, kind, file in (("entries", "coordinates", "delta"), ("low", "gain", "low.safetensors")):
        delta, found[name] = adapter(rng, kind, checkpoint.params, size=0.5)
        save(folder / name / file, delta)
    return checkpoint, {"entries": folder / "entries" / "delta", "low": folder / "low" / "low.safetensors"}, found


def alone(checkpoint, params, prompt: str) -> str:
    ids = encode_prompt(Row(prompt, "", "", "-"), checkpoint.tokenizer, "plain", 100)
    stops = checkpoint.tokenizer.stop_ids
    (tokens,) = generate(LanguageModel(checkpoint.config), params, [ids], max_new_tokens=5, stop_ids=stops)
    return checkpoint.tokenizer.decode(tokens)


def command(model: Path, paths: dict[str, Path], *more: str) -> list[str]:
    named = [part for name, path in paths.items() for part in ("--delta", f"{name}={path}")]
    return ["generate", "--model", str(model), *named, "--max-new-tokens", "5", "--template", "plain", *more]


def test_every_prompt_is_answered_by_the_base_and_by_every_delta(tiny_model, tuned, capsys) -> None:
    checkpoint, paths, models = tuned
    assert main([*command(tiny_model, paths, "--prompt", "1 + 2?", "--prompt", "3 + 9?"), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(a["prompt"], a["delta"]) for a in answers] == [
        (prompt, name) for prompt in ("1 + 2?", "3 + 9?") for name in (None, "entries", "low")
    ]
    for answer in answers:
        params = checkpoint.params if answer["delta"] is None else models[answer["delta"]]
        assert answer["answer"] == alone(checkpoint, params, answer["prompt"])


def test_requests_name_their_deltas(tiny_model, tuned, tmp_path, capsys) -> None:
    checkpoint, paths, models = tuned
    wanted = [("7 - 2?", "low"), ("1 + 1?", None), ("4?", "entries"), ("5?", "low"), ("6?", "entries")]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "delta": name}) for prompt, name in wanted) + "\n\n")
    assert main(command(tiny_model, paths, "--requests", str(file), "--batch", "2", "--json")) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(a["prompt"], a["delta"]) for a in answers] == wanted
    for answer in answers:
        params = checkpoint.params if answer["delta"] is None else models[answer["delta"]]
        assert answer["answer"] == alone(checkpoint, params, answer["prompt"])


def test_a_table_for_people_without_deltas(tiny_model, capsys) -> None:
    assert main(command(tiny_model, {}, "--prompt", "what [is] this?", "--temperature", "0.7")) == 0
    out = capsys.readouterr().out
    assert "(base)" in out
    assert "what [is] this?" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give either --prompt, or --requests"),
        (["--prompt", "a", "--delta", "x={tmp}/none"], "there is no delta at"),
        (["--prompt", "a", "--delta", "=x"], "delta must be NAME=PATH or a path"),
        (["--prompt", "a", "--delta", "entries={entries}"], "two deltas have the name 'entries'"),
        (["--prompt", "a", "--batch", "0"], "batch must be at least 1, got 0"),
        (["--requests", "{tmp}/none.jsonl"], "No such file"),
        (["--requests", "{tmp}/bad.jsonl"], "line 1: expected"),
        (["--requests", "{tmp}/other.jsonl"], "line 2: there is no delta 'z'; there are 'entries', 'low'"),
        (["--requests", "{tmp}/empty.jsonl"], "holds no requests"),
    ],
)
def test_bad_requests_are_refused(tiny_model, tuned, tmp_path, more, message, capsys) -> None:
    _, paths, _ = tuned
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "delta": "z"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    given = [part.replace("{tmp}", str(tmp_path)).replace("{entries}", str(paths["entries"])) for part in more]
    assert message in fails(command(tiny_model, paths, *given), capsys)


def test_a_delta_of_another_model_is_refused(tiny_model, tuned, tmp_path, capsys) -> None:
    checkpoint, _, _ = tuned
    other = jax.tree.map(lambda leaf: leaf + 1, checkpoint.params)
    save(tmp_path / "delta", adapter(np.random.default_rng(), "coordinates", other)[0])
    message = fails(command(tiny_model, {"a": tmp_path / "delta"}, "--prompt", "1?"), capsys)
    assert "belongs to another base" in message


def test_prompts_that_do_not_fit_and_odd_requests_are_errors(tiny_model, tmp_path, capsys):
    flags = ["generate", "--model", str(tiny_model)]
    assert "more than the model's 256 positions" in fails(
        [*flags, "--prompt", "2 + 2 = " * 40, "--max-new-tokens", "200"], capsys
    )
    assert "seed must lie between" in fails([*flags, "--prompt", "a", "--seed", str(2**70)], capsys)
    for content, message in (
        (b'{"prompt": "a", "Delta": null}', "unknown key 'Delta'"),
        (b"\xff\xfe", "cannot read --requests"),
        (b"[" * 100_000, "line 1: expected"),
    ):
        (tmp_path / "requests.jsonl").write_bytes(content)
        assert message in fails([*flags, "--requests", str(tmp_path / "requests.jsonl")], capsys)
    assert "cannot read --requests" in fails([*flags, "--requests", str(tmp_path / "none")], capsys)


def test_a_line_may_hold_any_separator_and_an_answer_any_bracket(tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "requests.jsonl").write_text('{"prompt": "2 +\u2028 2"}\n', encoding="utf-8")
    monkeypatch.setattr("jaxsparse.cli.generate._answers", lambda *given: [r"so \[x^2\] and [/INST] x"])
    assert main(["generate", "--model", str(tiny_model), "--requests", str(tmp_path / "requests.jsonl")]) == 0
    assert r"\[x^2\] and [/INST] x" in " ".join(capsys.readouterr().out.split())


def test_a_delta_of_another_dtype_says_so(tiny_model, tmp_path, capsys):
    checkpoint = load(tiny_model, dtype="bfloat16")
    tuned = jax.tree.map(lambda leaf: leaf, checkpoint.params)
    tuned["layers"]["mlp"]["up_proj"]["kernel"] = tuned["layers"]["mlp"]["up_proj"]["kernel"].at[0, 0, 0].add(1)
    deltas.save(tmp_path / "delta", deltas.diff(checkpoint.params, tuned))
    flags = ["generate", "--model", str(tiny_model), "--delta", f"a={tmp_path}/delta", "--prompt", "2", "--json"]
    assert main([*flags, "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert "delta 'a' is of bfloat16 weights, not float32" in fails([*flags, "--dtype", "float32"], capsys)
