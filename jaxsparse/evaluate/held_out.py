"""Loss, perplexity and exact match on held-out rows."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.data.batches import evaluation_batches
from jaxsparse.data.examples import Example, encode_prompt, encode_rows
from jaxsparse.data.prompts import Template, TrainOn
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.answers import is_correct
from jaxsparse.evaluate.compiled import batch_loss
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate

__all__ = ["HeldOut", "Measurement", "encode_held_out", "measure"]

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Measurement:
    """How well a model answers rows it was not trained on.

    Attributes:
        loss: mean cross-entropy of the answers' tokens, in nats per token.
        exact_match: share of rows whose generated answer is right, from 0 to 1.
        rows: number of rows measured.
        predictions: what the model wrote, one text a row.
        right: whether that is right, a row each; nothing where it was not looked at.
    """

    loss: float
    exact_match: float
    rows: int
    predictions: tuple[str, ...]
    right: tuple[bool, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss), of the answers' tokens; infinity where that is more than a float holds."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, encoded to be measured on.

    Attributes:
        rows: the rows.
        examples: prompt and right answer of every row.
        prompts: what the answer of every row is generated from.
        max_length: longest prompt and answer together, in tokens.
        max_new_tokens: longest generated answer, in tokens.
    """

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    prompts: tuple[Sequence[int], ...]
    max_length: int
    max_new_tokens: int


def encode_held_out(
    model: LanguageModel,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    max_length: int = 512,
    max_new_tokens: int = 24,
    template: Template = "auto",
    train_on: TrainOn = "answer",
    too_long: Literal["error", "drop"] = "error",
) -> HeldOut:
    """Turns rows into what `measure` takes.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        rows: the rows; scored on their `answer` (`jaxsparse.evaluate.answers.is_correct`).
        max_length: longest prompt and answer together, in tokens; never more than the model's positions.
        max_new_tokens: longest generated answer, in tokens.
        template: how a row becomes a prompt.
        train_on: the field whose loss is measured: the one that the model learns to write. Exact match is always that
            of `answer`.
        too_long: stop at a row whose answer leaves no room for a prompt, or drop such rows and warn once.

    Returns:
        The encoded rows.

    Raises:
        InputError: there are no rows, an answer does not fit, or max_new_tokens leaves no room for a prompt.
    """
    positions = model.config.max_position_embeddings
    if not 1 <= max_new_tokens < positions:
        raise InputError(
            f"max_new_tokens must lie between 1 and {positions - 1}, one less than the model's positions, "
            f"got {max_new_tokens}"
        )
    max_length = min(max_length, positions)
    if too_long == "drop":
        rows = _fitting(rows, tokenizer, template, max_length, train_on)
    examples = encode_rows(rows, tokenizer, template, max_length, train_on=train_on)
    room = min(max_length, positions - max_new_tokens)
    prompts = [
        example.prompt_ids
        if not example.truncated and len(example.prompt_ids) <= room
        else encode_prompt(row, tokenizer, template, room)
        for row, example in zip(rows, examples, strict=True)
    ]
    return HeldOut(tuple(rows), tuple(examples), tuple(prompts), max_length, max_new_tokens)


def _fitting(
    rows: Sequence[Row], tokenizer: Tokenizer, template: Template, max_length: int, train_on: TrainOn
) -> list[Row]:
    """The rows whose answers leave room for a prompt."""
    whole = encode_rows(rows, tokenizer, template, sys.maxsize, train_on=train_on)
    kept = [row for row, example in zip(rows, whole, strict=True) if len(example.answer_ids) < max_length]
    if not kept:
        raise InputError(f"no held-out row fits in max_length={max_length}")
    if dropped := len(rows) - len(kept):
        warnings.warn(
            f"dropped {dropped} of {len(rows)} held-out rows whose answers leave no room in max_length={max_length}",
            stacklevel=3,
        )
    return kept


def measure(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    held_out: HeldOut,
    *,
    batch: int = 16,
    advance: Advance = lambda rows: None,
) -> Measurement:
    """Measures loss on the right answers, and exact match of greedily generated ones.

    Args:
        model: the language model.
        params: its parameters.
        tokenizer: its tokenizer.
        held_out: what `encode_held_out` made of the rows.
        batch: rows at a time, at least 1.
        advance: called with the number of rows done since the last call; twice per row in all.

    Returns:
        The measurement.
    """
    loss_sum, tokens = 0.0, 0.0
    for part in evaluation_batches(held_out.examples, batch_size=batch, max_length=held_out.max_length):
        _, aux = batch_loss(model, params, part)
        loss_sum, tokens = loss_sum + float(aux["loss_sum"]), tokens + float(aux["tokens"])
        advance(int(np.sum(np.max(part.segments, axis=1) > 0)))
    predictions = _generate_all(model, params, held_out.prompts, tokenizer, held_out.max_new_tokens, batch, advance)
    right = [is_correct(text, row.answer) for text, row in zip(predictions, held_out.rows, strict=True)]
    return Measurement(
        loss_sum / max(tokens, 1.0), sum(right) / len(right), len(predictions), tuple(predictions), tuple(right)
    )


def _generate_all(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    batch: int,
    advance: Advance,
) -> list[str]:
    """Greedy answers to all prompts; prompts of like length go together, and every call has the same shape."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        filled = [prompts[at] for at in chosen] + [prompts[chosen[0]]] * (batch - len(chosen))
        written = generate(model, params, filled, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
        for at, ids in zip(chosen, written[: len(chosen)], strict=True):
            texts[at] = tokenizer.decode(ids)
        advance(len(chosen))
    return texts
