"""Loss, perplexity and exact match on held-out rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxsparse.data.batches import evaluation_batches
from jaxsparse.data.examples import encode_prompt, encode_rows
from jaxsparse.data.prompts import Template
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.answers import is_correct
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate

__all__ = ["Measurement", "measure"]

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Measurement:
    """How well a model answers rows it was not trained on.

    Attributes:
        loss: mean cross-entropy of the answers' tokens, in nats per token.
        exact_match: share of rows whose generated answer is right, from 0 to 1.
        rows: number of rows measured.
        predictions: what the model wrote, one text a row.
    """

    loss: float
    exact_match: float
    rows: int
    predictions: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """exp(loss), of the answers' tokens."""
        return math.exp(self.loss)


def measure(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    max_length: int = 512,
    max_new_tokens: int = 24,
    batch: int = 16,
    template: Template = "auto",
    advance: Advance = lambda rows: None,
) -> Measurement:
    """Measures loss on the right answers, and exact match of greedily generated ones.

    Args:
        model: the language model.
        params: its parameters.
        tokenizer: its tokenizer.
        rows: the rows; scored on their `answer` (`jaxsparse.evaluate.answers.is_correct`).
        max_length: longest prompt and answer together, in tokens.
        max_new_tokens: longest generated answer, in tokens.
        batch: rows at a time.
        template: how a row becomes a prompt.
        advance: called with the number of rows done since the last call; twice per row in all.

    Returns:
        The measurement.

    Raises:
        InputError: there are no rows, or an answer does not fit.
    """
    examples = encode_rows(rows, tokenizer, template, max_length)
    loss_of = jax.jit(model.loss)
    loss_sum, tokens = 0.0, 0.0
    for part in evaluation_batches(examples, batch_size=batch, max_length=max_length):
        _, aux = loss_of(params, part)
        loss_sum, tokens = loss_sum + float(aux["loss_sum"]), tokens + float(aux["tokens"])
        advance(int(np.sum(np.max(part.segments, axis=1) > 0)))
    room = min(max_length, model.config.max_position_embeddings - max_new_tokens)
    prompts = [encode_prompt(row, tokenizer, template, room) for row in rows]
    predictions = _generate_all(model, params, prompts, tokenizer, max_new_tokens, batch, advance)
    right = sum(is_correct(text, row.answer) for text, row in zip(predictions, rows, strict=True))
    return Measurement(loss_sum / max(tokens, 1.0), right / len(rows), len(rows), tuple(predictions))


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
