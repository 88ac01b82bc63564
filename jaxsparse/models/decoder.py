"""What the decoders of all families share: layers that are stacked and scanned, a head, and a cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from jaxsparse.common.errors import InputError
from jaxsparse.models.attention import Attend, Cache, Store, attend_cached, attend_in_turns, attend_rows, visible
from jaxsparse.models.configs import Config

__all__ = ["INIT", "Decoder", "Rotary", "check_remat", "embedding", "stack_layers"]

INIT = nnx.initializers.normal(0.02)
"""Initial weights of both families in `transformers`."""

Rotary = tuple[Array, Array] | None
"""Cosines and sines of the positions, for the families that rotate."""

_REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
}


def check_remat(remat: str) -> None:
    """Raises InputError unless remat names a policy."""
    if remat not in _REMAT:
        raise InputError(f"remat {remat!r} is unknown; use one of {', '.join(_REMAT)}")


def _as_they_are(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    return arrays


def embedding(entries: int, width: int, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike) -> nnx.Embed:
    """Returns a table whose rows keep the dtype they are stored in.

    nnx.Embed fixes the dtype at creation; a graph definition has to serve parameters of any dtype.
    """
    return nnx.Embed(
        entries,
        width,
        embedding_init=INIT,
        param_dtype=param_dtype,
        promote_dtype=_as_they_are,
        rngs=rngs,
    )


def stack_layers(create: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> Any:
    """Returns one module whose parameters have a leading axis of layers, each drawn on its own."""
    return nnx.vmap(create)(rngs.split(layers))


class Decoder(nnx.Module):
    """A decoder-only language model; the families fill in the embedding, the final norm and the blocks.

    Attributes:
        config: shapes and constants.
        remat: what the backward pass computes again, per layer: `none` nothing, `full` everything (attention then
            takes a row of the batch at a time), `dots` all but the products with weights.
        row_parts: how many devices share the rows of a batch.
        layers: a block whose parameters have a leading axis of layers. It is called with the hidden
            states, the rotary angles and an `Attend`, and returns the hidden states and the store.
    """

    config: Config
    remat: str
    layers: Any
    row_parts: int = 1

    def embed(self, tokens: Array, positions: Array) -> Array:
        """Returns the hidden states before the first layer."""
        raise NotImplementedError

    def rotary(self, positions: Array) -> Rotary:
        """Returns the rotary angles, or None where the family has none."""
        return None

    def finish(self, hidden: Array) -> Array:
        """Applies the final norm."""
        raise NotImplementedError

    def head(self) -> tuple[Array, int]:
        """Returns the matrix that gives the logits, and which of its axes is the hidden one."""
        raise NotImplementedError

    def window(self) -> int | None:
        """Returns how many tokens a token sees, itself included; None: all."""
        return None

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Returns the float32 logits of the next token; arguments as in `hidden`."""
        return self.project(self.hidden(tokens, positions, segments))

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns the hidden states after the final norm.

        Args:
            tokens: token numbers; one outside the vocabulary gives NaN.
            positions: position of every token in its sequence; counted from the row's start by default.
            segments: number of the sequence that every token of a packed row belongs to.

        Returns:
            The hidden states, in the dtype of the parameters.

        Raises:
            InputError: no positions, and rows longer than the model's longest sequence.
        """
        if positions is None:
            length = tokens.shape[1]
            if length > self.config.max_position_embeddings:
                raise InputError(
                    f"rows of {length} tokens, but max_position_embeddings is {self.config.max_position_embeddings}"
                )
            positions = jnp.arange(length)[None]
        turns = partial(attend_in_turns, row_parts=self.row_parts)
        rows = turns if self.remat == "full" else attend_rows
        attend = partial(rows, segments=segments, window=self.window())
        hidden, _ = self._run(tokens, positions, attend, None)
        return hidden

    def extend(
        self, tokens: Int[Array, "batch new"], positions: Int[Array, "batch new"], cache: Cache
    ) -> tuple[Float[Array, "batch new width"], Cache]:
        """Runs new tokens after those in the cache.

        Args:
            tokens: the new tokens.
            positions: of the new tokens in their sequences; -1 marks padding, which no token sees.
            cache: with room for them.

        Returns:
            The hidden states of the new tokens after the final norm, and the extended cache.
        """
        seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.used))
        mask = visible(positions, seen, self.window())
        attend = partial(attend_cached, mask=mask, slot=cache.used)
        # Padding has to stay finite: a masked NaN would still spoil the sums of attention.
        hidden, store = self._run(tokens, jnp.maximum(positions, 0), attend, (cache.keys, cache.values))
        assert store is not None
        return hidden, Cache(*store, seen, cache.used + tokens.shape[1])

    def _run(
        self, tokens: Array, positions: Array, attend: Callable[..., tuple[Array, Store]], store: Store
    ) -> tuple[Array, Store]:
        """Scans the layers; the store of keys and values, if any, is carried so that it is updated in place."""
        rotary = self.rotary(positions)
        graphdef, parameters = nnx.split(self.layers)

        def body(carry: tuple[Array, Store], layer: tuple[Any, Array]) -> tuple[tuple[Array, Store], None]:
            hidden, store = carry
            parameters, number = layer
            block_attend: Attend = partial(attend, store, number)
            return nnx.merge(graphdef, parameters)(hidden, rotary, block_attend), None

        numbers = jnp.arange(self.config.num_layers)
        start = (self.embed(tokens, positions), store)
        (hidden, store), _ = jax.lax.scan(_REMAT[self.remat](body), start, (parameters, numbers))
        return self.finish(hidden), store

    def project(
        self, hidden: Float[Array, "*batch width"], dtype: jax.typing.DTypeLike | None = None
    ) -> Float[Array, "*batch vocab"]:
        """Returns the logits of hidden states.

        Args:
            hidden: after the final norm.
            dtype: of the product, which accumulates in float32 at least; that wide by default.

        Returns:
            The logits.
        """
        matrix, axis = self.head()
        hidden, matrix = promote_dtype((hidden, matrix))
        if dtype is None:
            dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        return jax.lax.dot_general(
            hidden, matrix, (((hidden.ndim - 1,), (axis,)), ((), ())), preferred_element_type=dtype
        )
