"""Options by likelihood, against log probabilities summed by hand."""

import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.data.examples import encode_rows
from jaxsparse.data.rows import Row
from jaxsparse.evaluate.multiple_choice import measure_choices
from jaxsparse.evaluate.options import completions, parse_options
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel

TRUTHS = [Row(f"Is {a} + {a} = {2 * a}?\n\nAnswer format: true/false", "", "", "true") for a in (1, 20)]
SOLUTIONS = [
    Row(
        f"Please choose the correct solution to the question: what is {a} + 1?\n\n"
        f"Solution1: it is {a + 1}\n\nSolution2: {a} hundred\n\nSolution3: no\n\n"
        "Answer format: solution1/solution2/solution3",
        *("", "", "solution2"),
    )
    for a in (3, 40)
]
ROWS = [*TRUTHS, *SOLUTIONS]


@pytest.fixture(scope="module")
def model(tiny_model):
    base = load(tiny_model)
    return LanguageModel(base.config), base.params, base.tokenizer


def log_probabilities(model, params, prompt, answer):
    """Of every token of an answer, in NumPy."""
    ids = [*prompt, *answer]
    logits = np.asarray(model.logits(params, np.array([ids[:-1]])), np.float64)[0]
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits[np.arange(len(ids) - 1), ids[1:]][-len(answer) :]


def encoded(row, tokenizer, scored):
    if scored == "label":
        options = [Row(row.instruction, "", "", label) for label in parse_options(row).labels]
        return [(each.prompt_ids, each.answer_ids) for each in encode_rows(options, tokenizer)]
    texts = completions(parse_options(row))
    return [(tokenizer.encode(before), tokenizer.encode(text, add_bos=False)) for before, text in texts]


@pytest.mark.parametrize("scored", ["label", "text"])
def test_the_likeliest_option_is_chosen(model, scored):
    functions, params, tokenizer = model
    done = []
    found = measure_choices(functions, params, tokenizer, ROWS, scored=scored, batch=3, advance=done.append)
    chosen, per_token = [], []
    for row in ROWS:
        options = [log_probabilities(functions, params, *each) for each in encoded(row, tokenizer, scored)]
        chosen.append(int(np.argmax([each.sum() for each in options])))
        per_token.append(int(np.argmax([each.mean() for each in options])))
    assert found.chosen == tuple(chosen)
    assert found.right == (0, 0, 1, 1)
    assert found.accuracy == np.mean(np.equal(chosen, found.right))
    assert found.accuracy_per_token == np.mean(np.equal(per_token, found.right))
    assert found.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 3) / 4)
    assert sum(done) == 10


def test_what_cannot_be_chosen_is_said(model):
    functions, params, tokenizer = model
    with pytest.raises(InputError, match=r"must name its options.*right answer '7'"):
        measure_choices(functions, params, tokenizer, [Row("What is 3 + 4?", "", "", "7")])
    with pytest.raises(InputError, match="there are no rows"):
        measure_choices(functions, params, tokenizer, [])
    with pytest.raises(InputError, match="no room for a prompt in max_length=2"):
        measure_choices(functions, params, tokenizer, SOLUTIONS, scored="text", max_length=2)
