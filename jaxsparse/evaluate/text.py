"""Perplexity of running text: what a model knew before it was tuned, and may forget."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.data.batches import Batch
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.compiled import batch_loss
from jaxsparse.evaluate.held_out import Measurement
from jaxsparse.models.functional import LanguageModel

__all__ = ["measure_text"]


def measure_text(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    batch: int = 8,
    most_windows: int | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Measurement:
    """Measures loss on running text, in windows; every token counts once but the text's first and an incomplete end.

    Windows do not overlap, unless a stride lets every token but those of the first window see at least window − stride
    tokens before it; that costs window / stride times as much, and the loss is lower.

    Args:
        model: the language model.
        params: its parameters.
        tokenizer: its tokenizer.
        text: the text.
        window: tokens that the model sees at a time, at least 2; never more than its positions.
        stride: tokens from a window's start to the next one's, from 1 to window; None: window.
        batch: windows at a time, at least 1.
        most_windows: so many of the first windows; None: all.
        advance: called with the number of windows done since the last call.

    Returns:
        A measurement whose `rows` are windows, without predictions; `perplexity` is exp(loss).

    Raises:
        InputError: a size is out of range, or the text does not fill a window.
    """
    if window < 2 or batch < 1 or (most_windows is not None and most_windows < 1):
        raise InputError(
            f"window={window} must be at least 2, batch={batch} and most_windows={most_windows} at least 1"
        )
    window = min(window, model.config.max_position_embeddings)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise InputError(f"stride={stride} must lie between 1 and window={window}")
    ids = np.array(tokenizer.encode(text, add_bos=False), np.int32)
    count = max(0, (len(ids) - 1 - window) // stride + 1)
    count = count if most_windows is None else min(count, most_windows)
    if count < 1:
        raise InputError(f"the text has {len(ids)} tokens, which do not fill a window={window}")
    places = stride * np.arange(count)[:, None] + np.arange(window)
    tokens, targets = ids[places], ids[places + 1]
    weights = np.ones((count, window), np.float32)
    # Of a window that overlaps, only what the one before did not have as a target.
    weights[1:, : window - stride] = 0
    loss_sum, number = 0.0, 0.0
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        _, aux = batch_loss(model, params, _filled(tokens[part], targets[part], weights[part], batch))
        loss_sum, number = loss_sum + float(aux["loss_sum"]), number + float(aux["tokens"])
        advance(len(tokens[part]))
    return Measurement(loss_sum / number, float("nan"), count, ())


def _filled(tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray, batch: int) -> Batch:
    """A batch of always the same number of rows; those that are missing are padding."""
    rows, window = tokens.shape
    missing = ((0, batch - rows), (0, 0))
    places = np.broadcast_to(np.arange(window, dtype=np.int32), (batch, window))
    segments = np.pad(np.ones_like(tokens), missing)
    return Batch(np.pad(tokens, missing), np.pad(targets, missing), np.pad(weights, missing), places, segments)
