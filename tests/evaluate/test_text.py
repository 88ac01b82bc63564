"""Running text in windows that overlap, and what is forgotten of it."""

import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.forgetting import forgotten_text
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
