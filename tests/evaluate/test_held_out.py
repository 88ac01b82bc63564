"""Measuring a model: against NumPy, row by row."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.data import encode_rows, load_rows
from jaxsparse.evaluate import Measurement, encode_held_out, is_correct, measure
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel


def test_measure_agrees_with_numpy_row_by_row(
    tiny_model: Path, problems: dict[str, Path], rng: np.random.Generator
) -> None:
    base, rows = load(tiny_model), load_rows(problems["held_out"])[:3]
    model = LanguageModel(base.config)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32), base.params)
    held_out = encode_held_out(model, base.tokenizer, rows, max_length=200, max_new_tokens=3, template="plain")
    assert not any(example.truncated for example in held_out.examples)
    done: list[int] = []
    found = measure(model, params, base.tokenizer, held_out, batch=2, advance=done.append)

    run = jax.jit(model.logits)

    def logits_of(ids: list[int]) -> np.ndarray:
        """After every token; the padding behind them, which they do not see, spares compilations."""
        return np.asarray(run(params, np.array([ids + [0] * (200 - len(ids))])), np.float64)[0, : len(ids)]

    losses, written = [], []
    for example in encode_rows(rows, base.tokenizer, "plain", 200):
        ids = [*example.prompt_ids, *example.answer_ids]
        logits = logits_of(ids)
        for at in range(len(example.prompt_ids), len(ids)):
            before = logits[at - 1]
            losses.append(np.log(np.sum(np.exp(before - before.max()))) + before.max() - before[ids[at]])
        grown = list(example.prompt_ids)
        for _ in range(3):
            grown.append(int(np.argmax(logits_of(grown)[-1])))
        new = grown[len(example.prompt_ids) :]
        stop = next((at for at, token in enumerate(new) if token in base.tokenizer.stop_ids), len(new))
        written.append(base.tokenizer.decode(new[:stop]))
    np.testing.assert_allclose(found.loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(found.perplexity, np.exp(np.mean(losses)), rtol=1e-2)
    assert found.predictions == tuple(written)
    assert found.exact_match == np.mean([is_correct(text, row.answer) for text, row in zip(written, rows, strict=True)])
    assert (found.rows, sum(done)) == (3, 6)


def test_perplexity_may_be_infinite() -> None:
    assert Measurement(710.0, 0.0, 1, ("",)).perplexity == math.inf


@pytest.mark.parametrize("tokens", [-1, 0, 256, 1000])
def test_answers_must_leave_room_for_a_prompt(tiny_model: Path, problems: dict[str, Path], tokens: int) -> None:
    base, rows = load(tiny_model), load_rows(problems["held_out"])
    with pytest.raises(InputError, match=f"max_new_tokens must lie between 1 and 255.*got {tokens}"):
        encode_held_out(LanguageModel(base.config), base.tokenizer, rows, max_new_tokens=tokens, template="plain")


def test_rows_that_are_dropped_take_their_prompts_along(tiny_model: Path, problems: dict[str, Path]) -> None:
    base, rows = load(tiny_model), load_rows(problems["held_out"])[:3]
    rows[0] = dataclasses.replace(rows[0], answer="7 " * 300)
    model = LanguageModel(base.config)
    options = {"template": "plain", "max_length": 128}
    with pytest.raises(InputError, match="row 1"):
        encode_held_out(model, base.tokenizer, rows, **options)
    with pytest.warns(UserWarning, match="dropped 1 of 3"):
        kept = encode_held_out(model, base.tokenizer, rows, too_long="drop", **options)
    assert kept == encode_held_out(model, base.tokenizer, rows[1:], **options)
    with pytest.raises(InputError, match="no held-out row fits"):
        encode_held_out(model, base.tokenizer, rows[:1], too_long="drop", **options)
