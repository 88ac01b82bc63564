"""Batched generation with a cache of keys and values."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxsparse.common.errors import InputError
from jaxsparse.common.hosts import to_host
from jaxsparse.models.attention import Cache

__all__ = ["Decodes", "generate"]

_BUCKET = 64
"""Prompts are padded to a multiple of this many tokens, so that few lengths are compiled."""


@runtime_checkable
class Decodes(Protocol):
    """What continues tokens: a `LanguageModel`, or one whose rows have adapters of their own; hashable."""

    @property
    def config(self) -> Any:
        """The configuration."""

    def dtype(self, params: Any) -> Any:
        """Returns the dtype that it computes in."""

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Cache:
        """Returns a cache of keys and values with nothing in it."""

    def next_logits(self, params: Any, tokens: Any, positions: Any, cache: Cache) -> tuple[Array, Cache]:
        """Returns the logits of the token after the last of new tokens, and the extended cache."""


def generate(
    model: Decodes,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    key: PRNGKeyArray | None = None,
    pad_id: int = 0,
) -> list[list[int]]:
    """Continues all prompts at once.

    Compiled once per number of prompts, length bucket (multiples of 64 tokens) and max_new_tokens.

    Args:
        model: the language model.
        params: its parameters.
        prompts: token numbers, one list a row; rows may differ in length and do not influence each other.
        max_new_tokens: most tokens to add to a row.
        stop_ids: tokens that end a row; may be empty.
        temperature: 0 takes the likeliest token, ties to the lowest number; above, tokens are drawn from
            softmax(logits / temperature).
        key: randomness of temperature > 0; row i of the same key always draws the same.
        pad_id: fills the rows; never seen by any token.

    Returns:
        The new tokens of each row, without the stop token.

    Raises:
        InputError: an empty prompt, a token outside the vocabulary, a row that could grow beyond
            max_position_embeddings, max_new_tokens below 1, a negative temperature, or temperature > 0
            without a key.

    Example:
        >>> from jaxsparse.models.configs import GPT2Config
        >>> from jaxsparse.models.functional import LanguageModel
        >>> model = LanguageModel(
        ...     GPT2Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2)
        ... )
        >>> params = model.init(jax.random.key(0))
        >>> [len(row) for row in generate(model, params, [[1, 2], [3]], max_new_tokens=4, stop_ids=[])]
        [4, 4]
    """
    _check(model, prompts, max_new_tokens, temperature, key)
    if not prompts:
        return []
    tokens, lengths = _left_padded(prompts, pad_id)
    generated = _generate(
        model,
        params,
        tokens,
        lengths,
        jnp.asarray(stop_ids, jnp.int32),
        jnp.float32(temperature),
        jax.random.key(0) if key is None else key,
        max_new_tokens=max_new_tokens,
        sample=temperature > 0,
    )
    return [_before_stop(row, set(stop_ids)) for row in to_host(generated).tolist()]


def _check(
    model: Decodes,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    key: PRNGKeyArray | None,
) -> None:
    """Raises InputError for what cannot be generated."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature >= 0:
        raise InputError(f"temperature must be 0 or more, not {temperature}")
    if temperature > 0 and key is None:
        raise InputError(f"temperature {temperature} draws tokens at random and needs a key")
    vocab_size, longest = model.config.vocab_size, model.config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {number} is empty; give it at least one token, such as the BOS token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InputError(
                f"prompt {number} has tokens from {min(prompt)} to {max(prompt)}, but the vocabulary has {vocab_size}"
            )
        if len(prompt) + max_new_tokens > longest:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} it could "
                f"grow beyond max_position_embeddings {longest}"
            )


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts with their ends aligned, (batch, bucket), and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // _BUCKET) * _BUCKET
    tokens = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, lengths


def _before_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    """Cuts a row at its first stop token."""
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]


class _Progress(NamedTuple):
    """What the decoding loop carries.

    Attributes:
        step: number of tokens generated.
        tokens: the generated tokens.
        stopped: whether a row has had its stop token.
        cache: keys and values of all tokens but the last.
    """

    step: Int[Array, ""]
    tokens: Int[Array, "batch new"]
    stopped: Bool[Array, " batch"]
    cache: Cache


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sample"))
def _generate(
    model: Decodes,
    params: Any,
    prompts: Int[Array, "batch width"],
    lengths: Int[Array, " batch"],
    stop_ids: Int[Array, " stops"],
    temperature: Array,
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    sample: bool,
) -> Int[Array, "batch new"]:
    """Runs the prompts, then one token after the other until all rows have stopped."""
    batch, width = prompts.shape

    def choose(logits: Array, step: Array | int) -> Array:
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(jnp.arange(batch))
        return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)

    def record(progress: _Progress, logits: Array, cache: Cache) -> _Progress:
        chosen = choose(logits, progress.step)
        tokens = jax.lax.dynamic_update_slice(progress.tokens, chosen[:, None], (0, progress.step))
        stopped = progress.stopped | jnp.isin(chosen, stop_ids)
        return _Progress(progress.step + 1, tokens, stopped, cache)

    def unfinished(progress: _Progress) -> Array:
        return (progress.step < max_new_tokens) & ~jnp.all(progress.stopped)

    def decode(progress: _Progress) -> _Progress:
        last = jax.lax.dynamic_slice(progress.tokens, (0, progress.step - 1), (batch, 1))
        positions = (lengths + progress.step - 1)[:, None]
        return record(progress, *model.next_logits(params, last, positions, progress.cache))

    cache = model.empty_cache(batch, width + max_new_tokens, model.dtype(params))
    # Counted from each row's first token; padding gets -1.
    positions = jnp.maximum(jnp.arange(width)[None] - (width - lengths)[:, None], -1).astype(jnp.int32)
    start = _Progress(jnp.int32(0), jnp.zeros((batch, max_new_tokens), jnp.int32), jnp.zeros(batch, bool), cache)
    first = record(start, *model.next_logits(params, prompts, positions, cache))
    return jax.lax.while_loop(unfinished, decode, first).tokens
