"""Running text in windows that overlap, and what is forgotten of it."""

import jax
import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.forgetting import collapse_rate, forget_ratio, forgotten_text
from jaxsparse.evaluate.held_out import Measurement
from jaxsparse.evaluate.text import measure_text
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel


@pytest.fixture(scope="module")
def model(tiny_model):
    base = load(tiny_model)
    return LanguageModel(base.config), base.params, base.tokenizer


def log_probabilities(model, params, ids):
    logits = np.asarray(model.logits(params, np.array([ids[:-1]])), np.float64)[0]
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]]


def test_windows_that_overlap_show_more_and_count_every_token_once(model):
    functions, params, tokenizer = model
    text = " ".join(f"{number} plus {number} is {2 * number}." for number in range(20))
    ids = tokenizer.encode(text, add_bos=False)
    window, stride = 30, 12
    starts = range(0, len(ids) - window, stride)
    hand = [log_probabilities(functions, params, ids[at : at + window + 1]) for at in starts]
    hand = np.concatenate([each[0 if at == 0 else window - stride :] for at, each in zip(starts, hand, strict=True)])
    found = measure_text(functions, params, tokenizer, text, window=window, stride=stride, batch=4)
    assert (found.rows, len(hand)) == (len(starts), window + stride * (len(starts) - 1))
    assert found.loss == pytest.approx(-hand.mean(), rel=1e-5)
    with pytest.raises(InputError, match="stride=31 must lie between 1 and window=30"):
        measure_text(functions, params, tokenizer, text, window=window, stride=31)


def test_forgotten_text_is_a_ratio_of_perplexities(rng):
    before, after = (Measurement(float(loss), float("nan"), 5, ()) for loss in rng.uniform(1, 4, 2))
    assert forgotten_text(before, after) == pytest.approx(after.perplexity / before.perplexity)
    assert forgotten_text(before, before) == 1
    with pytest.raises(InputError, match="of the same text"):
        forgotten_text(before, Measurement(1.0, float("nan"), 4, ()))


def test_a_uniform_model_has_the_vocabularys_perplexity(model):
    functions, params, tokenizer = model
    nothing = jax.tree.map(np.zeros_like, params)
    found = measure_text(functions, nothing, tokenizer, "1 + 1 = 2. " * 60, window=32)
    assert found.perplexity == pytest.approx(functions.config.vocab_size, rel=1e-4)


def test_forgetting_counts_what_was_known(rng):
    before, after = (rng.random(200) < 0.6 for _ in range(2))
    assert forget_ratio(before.tolist(), after.tolist()) == pytest.approx((before & ~after).sum() / before.sum())
    assert forget_ratio([False], [True]) is None
    assert collapse_rate([float("nan"), 0.5], base=0.6) == 0.5  # a run that diverged has collapsed
    with pytest.raises(InputError, match="of the same questions"):
        forget_ratio([True], [])
    with pytest.raises(InputError, match="0 runs"):
        collapse_rate([], base=1.0)
