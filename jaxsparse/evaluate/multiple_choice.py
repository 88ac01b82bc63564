"""Multiple choice by likelihood: which of the options that a question names a model finds likeliest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxsparse.common.errors import InputError
from jaxsparse.data.batches import evaluation_batches
from jaxsparse.data.examples import Example, encode_rows
from jaxsparse.data.prompts import Template
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.compiled import answer_log_likelihoods
from jaxsparse.evaluate.options import Options, completions, parse_options
from jaxsparse.models.functional import LanguageModel

__all__ = ["Choices", "measure_choices"]


@dataclass(frozen=True)
class Choices:
    """What a model chose.

    Attributes:
        accuracy: share of rows whose likeliest option is the right one, by the sum over the option's tokens of their
            log probability; from 0 to 1.
        accuracy_per_token: the same by the mean.
        chosen: the number of the likeliest option of every row, by the sum.
        right: the number of the right one.
        chance: accuracy of choosing at random.
    """

    accuracy: float
    accuracy_per_token: float
    chosen: tuple[int, ...]
    right: tuple[int, ...]
    chance: float


def measure_choices(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    scored: Literal["label", "text"] = "label",
    max_length: int = 512,
    template: Template = "auto",
    batch: int = 16,
    advance: Callable[[int], None] = lambda options: None,
) -> Choices:
    """Scores every option of every row, and takes the likeliest.

    Args:
        model: the language model.
        params: its parameters.
        tokenizer: its tokenizer.
        rows: questions that name their options, see `parse_options`.
        scored: "label": what the option is called, after the prompt that fine-tuning trains on; "text": what it says,
            after the bare question, as models are compared that were not fine-tuned, see `completions`.
        max_length: longest prompt and option together, in tokens; prompts lose their start.
        template: how a row becomes a prompt, for "label".
        batch: options at a time.
        advance: called with the number of options done since the last call.

    Returns:
        What was chosen.

    Raises:
        InputError: there are no rows, one does not name its options, or an option leaves no room for a prompt.
    """
    if not rows:
        raise InputError("there are no rows to choose in")
    if scored not in ("label", "text"):
        raise InputError(f"scored must be 'label' or 'text', got {scored!r}")
    options = [parse_options(row) for row in rows]
    max_length = min(max_length, model.config.max_position_embeddings)
    if scored == "label":
        asked = [replace(row, answer=label) for row, own in zip(rows, options, strict=True) for label in own.labels]
        examples = encode_rows(asked, tokenizer, template, max_length)
    else:
        examples = [example for own in options for example in _encoded_texts(own, tokenizer, max_length)]
    sums = _log_likelihoods(model, params, examples, max_length, batch, advance)
    lengths = np.array([len(example.answer_ids) for example in examples])
    ends = np.cumsum([len(own.labels) for own in options])[:-1]
    by_sum = [int(np.argmax(each)) for each in np.split(sums, ends)]
    by_mean = [int(np.argmax(each)) for each in np.split(sums / lengths, ends)]
    right = [own.right for own in options]
    return Choices(
        accuracy=float(np.mean(np.equal(by_sum, right))),
        accuracy_per_token=float(np.mean(np.equal(by_mean, right))),
        chosen=tuple(by_sum),
        right=tuple(right),
        chance=float(np.mean([1 / len(own.labels) for own in options])),
    )


def _encoded_texts(options: Options, tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """The options' texts after the bare question; nothing closes them."""
    examples = []
    for before, text in completions(options):
        prompt = tokenizer.encode(before)
        # Some tokenizers write a text otherwise after another than alone.
        both = tokenizer.encode(before + text)
        answer = both[len(prompt) :] if both[: len(prompt)] == prompt else tokenizer.encode(text, add_bos=False)
        room = max_length - len(answer)
        if room < 1 or not answer:
            raise InputError(
                f"an option of {len(answer)} tokens leaves no room for a prompt in max_length={max_length}: {text!r}"
            )
        examples.append(Example(tuple(prompt[-room:]), tuple(answer), max(0, len(prompt) - room)))
    return examples


def _log_likelihoods(
    model: LanguageModel,
    params: Any,
    examples: Sequence[Example],
    max_length: int,
    batch: int,
    advance: Callable[[int], None],
) -> Float[np.ndarray, " examples"]:
    """The log probability of every example's answer."""
    found: list[float] = []
    for part in evaluation_batches(examples, batch_size=batch, max_length=max_length):
        own = np.asarray(answer_log_likelihoods(model, params, part))[: len(examples) - len(found)]
        found += own.tolist()
        advance(len(own))
    return np.array(found)
