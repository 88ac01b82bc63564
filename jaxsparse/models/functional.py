"""A language model as pure functions of a nested dict of parameters."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsparse.common.errors import InputError
from jaxsparse.models.attention import Cache, empty_cache
from jaxsparse.models.configs import Config, GPT2Config
from jaxsparse.models.decoder import Decoder, check_remat
from jaxsparse.models.gpt2 import GPT2
from jaxsparse.models.llama import Llama
from jaxsparse.models.losses import cross_entropy_sum

__all__ = ["Batch", "LanguageModel", "Parameters"]

Parameters: TypeAlias = Mapping[str, Any]
"""A nested dict of arrays; paths as in `LanguageModel.abstract`."""

Tokens: TypeAlias = Int[Array | np.ndarray, "batch length"]


@runtime_checkable
class Batch(Protocol):
    """What `LanguageModel.loss` reads of a batch; every array is (batch, length)."""

    @property
    def tokens(self) -> Any:
        """Input tokens, integers."""

    @property
    def targets(self) -> Any:
        """The token to predict at each place, integers inside the vocabulary."""

    @property
    def weights(self) -> Any:
        """float32; 0 where the target does not count."""

    @property
    def positions(self) -> Any:
        """Position of every token in its sequence, integers."""

    @property
    def segments(self) -> Any:
        """Number of the sequence that every token of a packed row belongs to, integers."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A language model without parameters: a hashable description and the functions that go with it.

    Attributes:
        config: shapes and constants; decides on the family.
        remat: what the backward pass computes again, per layer: `none`, `full` or `dots` (all but the
            products with weights).
        loss_chunk: most tokens whose logits exist at a time in `loss`.
        row_parts: how many devices share the rows of a batch, in equal parts (`js.Sharding.row_parts`).

    Raises:
        InputError: an unknown remat, or a loss_chunk or row_parts below 1.

    Example:
        >>> model = LanguageModel(
        ...     GPT2Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2)
        ... )
        >>> params = model.init(jax.random.key(0))
        >>> params["layers"]["attn"]["c_attn"]["kernel"].shape
        (2, 8, 24)
        >>> model.logits(params, jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)
    """

    config: Config
    remat: str = "none"
    loss_chunk: int = 512
    row_parts: int = 1

    def __post_init__(self) -> None:
        check_remat(self.remat)
        if self.loss_chunk < 1:
            raise InputError(f"loss_chunk must be at least 1 token, not {self.loss_chunk}")
        if self.row_parts < 1:
            raise InputError(f"row_parts must be at least 1 device, not {self.row_parts}")

    def _create(self, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike) -> Decoder:
        options: Any = {"rngs": rngs, "param_dtype": dtype, "remat": self.remat}
        config = self.config
        module = GPT2(config, **options) if isinstance(config, GPT2Config) else Llama(config, **options)
        module.row_parts = self.row_parts
        return module

    @functools.cached_property
    def _graphdef(self) -> Any:
        return nnx.graphdef(nnx.eval_shape(lambda: self._create(nnx.Rngs(0), jnp.float32)))

    def module(self, params: Parameters) -> Decoder:
        """Returns the NNX module that holds the parameters.

        Args:
            params: nested dict as `init` returns it.

        Returns:
            The module; nothing is copied.
        """
        return nnx.merge(self._graphdef, nnx.State(dict(params)))

    def abstract(self, dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, Any]:
        """Returns the shapes of the parameters.

        Args:
            dtype: of every parameter.

        Returns:
            A nested dict of ShapeDtypeStruct. Kernels are (in, out); whatever lies under `layers` has a
            leading axis of layers.
        """
        state = nnx.state(nnx.eval_shape(lambda: self._create(nnx.Rngs(0), dtype)))
        return nnx.to_pure_dict(state)

    def init(self, key: PRNGKeyArray, dtype: jax.typing.DTypeLike = jnp.float32) -> dict[str, Any]:
        """Draws parameters as `transformers` does: normal with deviation 0.02, biases 0, norms 1.

        Args:
            key: from `jax.random.key`.
            dtype: of every parameter.

        Returns:
            A nested dict of arrays.
        """

        @jax.jit
        def draw(key: PRNGKeyArray) -> dict[str, Any]:
            return nnx.to_pure_dict(nnx.state(self._create(nnx.Rngs(key), dtype)))

        return draw(key)

    def hidden(
        self,
        params: Parameters,
        tokens: Tokens,
        positions: Tokens | None = None,
        segments: Tokens | None = None,
    ) -> Float[Array, "batch length width"]:
        """Returns the hidden states after the final norm.

        Args:
            params: nested dict of arrays, all float32 or all bfloat16; the model computes in their dtype.
            tokens: token numbers; one outside the vocabulary gives NaN.
            positions: position of every token in its sequence; counted from the row's start by default.
            segments: number of the sequence that every token of a packed row belongs to: tokens see only
                tokens of their own number. By default a row is one sequence.

        Returns:
            The hidden states, in the dtype of the parameters.

        Raises:
            InputError: no positions, and rows longer than the model's longest sequence.
        """
        return self.module(params).hidden(*_as_arrays(tokens, positions, segments))

    def logits(
        self,
        params: Parameters,
        tokens: Tokens,
        positions: Tokens | None = None,
        segments: Tokens | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Returns the float32 logits of the token after each; arguments and errors as in `hidden`."""
        return self.module(params)(*_as_arrays(tokens, positions, segments))

    def loss(self, params: Parameters, batch: Batch) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean cross-entropy of the tokens that count.

        Args:
            params: nested dict of arrays.
            batch: tokens, targets, weights, positions and segments.

        Returns:
            The weighted sum of the negative log-likelihoods over the sum of the weights (at least 1), in
            nats per token and float32; and `tokens`, the sum of the weights, and `loss_sum`.
        """
        module = self.module(params)
        tokens, positions, segments = _as_arrays(batch.tokens, batch.positions, batch.segments)
        weights = jnp.asarray(batch.weights)
        hidden = module.hidden(tokens, positions, segments)
        # Logits in the parameters' dtype: wider ones would have the backward pass widen the whole head.
        project = functools.partial(module.project, dtype=hidden.dtype)
        loss_sum = cross_entropy_sum(project, hidden, jnp.asarray(batch.targets), weights, self.loss_chunk)
        counted = jnp.sum(weights)
        return loss_sum / jnp.maximum(counted, 1.0), {"tokens": counted, "loss_sum": loss_sum}

    def dtype(self, params: Parameters) -> Any:
        """Returns the dtype that the model computes in."""
        return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(params)))

    def empty_cache(self, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> Cache:
        """Returns a cache of keys and values with nothing in it.

        Args:
            batch: number of rows.
            slots: number of tokens that fit in a row, padding included.
            dtype: dtype of the parameters.

        Returns:
            The cache, for `next_logits`.
        """
        config = self.config
        return empty_cache(config.num_layers, batch, slots, config.num_kv_heads, config.head_dim, dtype)

    def next_logits(
        self, params: Parameters, tokens: Tokens, positions: Tokens, cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Runs new tokens after those in the cache.

        Args:
            params: nested dict of arrays.
            tokens: the new tokens; rows are padded on the left.
            positions: of the new tokens in their sequences; -1 marks padding.
            cache: with room for them.

        Returns:
            The float32 logits of the token after the last one, and the extended cache.
        """
        module = self.module(params)
        hidden, cache = module.extend(jnp.asarray(tokens), jnp.asarray(positions), cache)
        return module.project(hidden[:, -1]), cache


def _as_arrays(*arrays: Any) -> tuple[Any, ...]:
    """Turns NumPy arrays into JAX arrays and leaves None as it is."""
    return tuple(None if array is None else jnp.asarray(array) for array in arrays)
