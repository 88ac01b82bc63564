"""Serving many deltas at once: every row of a batch has its own adapter, or none, on the unmodified model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.stack import NOBODY, Group, Stacked, TensorStack
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.slotted import INPUT, SlotRule, SlottedWeight, UnsupportedUseError, slotted
from jaxsparse.kernels import adapter_matmul
from jaxsparse.models.functional import LanguageModel, Parameters

__all__ = ["ServedModel", "ServedParameters", "serve"]


@dataclass(frozen=True)
class _AdapterRows(SlotRule):
    """The term x D of every row's own adapter, and its gain where it has one.

    Slots: "adapters", (rows,), numbers of the rows' adapters; "groups", of one matrix.

    Attributes:
        outputs: number of outputs of the matrix.
    """

    outputs: int
    overlay = True

    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        """Nothing: adapters are served, not trained."""
        raise NotImplementedError

    def check_use(self, weight: SlottedWeight, tokens: tuple[int, ...], side: str) -> None:
        """Checks that the model multiplies rows by the weight, and nothing that is ordered otherwise."""
        rows = weight.slots["adapters"].shape[-1]
        if side != INPUT:
            raise UnsupportedUseError(weight.path, "a product with the transposed weight while rows have adapters")
        if not tokens or (tokens[0] != rows and (len(tokens) > 1 or tokens[0] % rows)):
            raise UnsupportedUseError(
                weight.path, f"a product with values whose leading axes {tokens} are not the {rows} rows"
            )

    def term(self, slots: Any, values: Float[Array, "tokens inputs"], side: str) -> Float[Array, "tokens outputs"]:
        """Returns x D, zeros for rows whose adapter changes nothing here."""
        adapters, groups = slots["adapters"], slots["groups"]
        total = jnp.zeros((values.shape[0], self.outputs), jnp.promote_types(values.dtype, jnp.float32))
        for kind, product in (("slices", _of_slices), ("factors", _of_factors)):
            if kind in groups:
                total = total + product(values, _places(groups[kind], adapters), groups[kind].arrays)
        for kind, outputs in (("entries", self.outputs), ("neurons", None)):
            if kind in groups:
                places = jnp.repeat(_places(groups[kind], adapters), values.shape[0] // adapters.shape[0])
                index, entries = (groups[kind].arrays[name] for name in ("index", "values"))
                total = total + adapter_matmul(values, places, index, entries, outputs, is_sorted=True)
        return total

    def factor(self, slots: Any, added: Float[Array, "tokens outputs"]) -> Float[Array, "tokens outputs"] | None:
        """Returns the gain of every row's adapter, 1 for those that have none."""
        if "gains" not in slots["groups"]:
            return None
        places = _places(slots["groups"]["gains"], slots["adapters"])
        gains = slots["groups"]["gains"].arrays["gain"][jnp.maximum(places, 0)]
        gains = jnp.where(places[:, None] >= 0, gains, 1)
        return jnp.repeat(gains, added.shape[0] // places.shape[0], axis=0)


def _places(group: Group, adapters: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """The place of every row's adapter in a group; -1 for none."""
    inside = (adapters >= 0) & (adapters < group.place.shape[0])
    return jnp.where(inside, group.place[jnp.where(inside, adapters, 0)], NOBODY)


def _of_factors(
    values: Float[Array, "tokens inputs"], places: Int[Array, " rows"], arrays: dict[str, Array]
) -> Float[Array, "tokens outputs"]:
    """(x A) B of every row; the factors are gathered once a row, not once a token."""
    x, a, b = _by_rows(values, places, arrays["a"], arrays["b"])
    return _own(places, _product(_product(x, a), b))


def _of_slices(
    values: Float[Array, "tokens inputs"], places: Int[Array, " rows"], arrays: dict[str, Array]
) -> Float[Array, "tokens outputs"]:
    """x[index] V of every row; the slices are gathered once a row, not once a token."""
    x, index, slices = _by_rows(values, places, arrays["index"], arrays["values"])
    return _own(places, _product(jnp.take_along_axis(x, index[:, None], axis=2), slices))


def _by_rows(values: Array, places: Array, *arrays: Array) -> tuple[Array, ...]:
    """Values as (rows, length, inputs), and each row's own arrays; those of a single adapter serve all rows as one."""
    if arrays[0].shape[0] == 1:
        return values[None], *arrays
    own = [array[jnp.maximum(places, 0)] for array in arrays]
    return values.reshape(places.shape[0], -1, values.shape[1]), *own


def _product(left: Array, right: Array) -> Array:
    dtype = jnp.promote_types(jnp.result_type(left, right), jnp.float32)
    return jnp.matmul(left, right, precision="highest", preferred_element_type=dtype)


def _own(places: Int[Array, " rows"], product: Float[Array, "_ _ outputs"]) -> Float[Array, "tokens outputs"]:
    """A product token by token, zeros for rows that have none."""
    by_rows = product.reshape(places.shape[0], -1, product.shape[2])
    return jnp.where(places[:, None, None] >= 0, by_rows, 0).reshape(-1, product.shape[2])


def serve(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of a model's parameters run every row of a batch with an adapter of its own.

    The model stays as it is: its weights are followed through it, as the fused engine does, and where it multiplies by
    one, each row's own change is added: single entries by sparse products, slices by small dense ones, factors one
    after the other, a gain at last.

    Args:
        function: (params, *arguments) -> a pytree of arrays; the first axis of what it multiplies by weights must be
            the batch's rows. What is not an array belongs into a closure.

    Returns:
        A function (params, stacked, adapters, *arguments): `params` are the base's, `stacked` is what `js.deltas.stack`
        returned, `adapters` (rows,) int32, the number of every row's adapter, -1 for none, as `stacked.numbers` returns
        them. It can be jitted.

    Raises:
        InputError: when called: `params` lack a tensor that an adapter changes; or the model uses one otherwise than in
            a product with rows, such as an embedding's look-up.

    Example:
        >>> import jaxsparse as js
        >>> def model(params, x):
        ...     return x @ params["kernel"]
        >>> base = {"kernel": jnp.zeros((2, 1))}
        >>> tuned = [{"kernel": base["kernel"].at[at].set(1.0)} for at in range(2)]
        >>> stacked = js.deltas.stack([js.deltas.diff(base, each) for each in tuned], base=base)
        >>> js.serve(model)(base, stacked, stacked.numbers([1, None, 0]), jnp.array([[1.0, 2.0]] * 3))
        Array([[2.],
               [0.],
               [1.]], dtype=float32)
    """

    def served(params: Any, stacked: Stacked, adapters: Int[Array | np.ndarray, " rows"], *arguments: Any) -> Any:
        pairs, structure = flatten_with_paths(params)
        rows = jnp.asarray(adapters, jnp.int32)
        _check_there(dict(pairs), stacked)
        leaves = [
            _wrapped(path, leaf, stacked.tensors[path], rows) if path in stacked.tensors else leaf
            for path, leaf in pairs
        ]
        try:
            return followed(function)(jax.tree.unflatten(structure, leaves), *arguments)
        except UnsupportedUseError as error:
            raise InputError(
                f"rows cannot have changes of their own of weight {error.path}, which the model uses in {error.what}: "
                "apply that delta alone, or leave the weight out of its method's targets"
            ) from error

    return served


def _check_there(tensors: dict[str, Any], stacked: Stacked) -> None:
    for path, tensor in stacked.tensors.items():
        shape = tensor.view.shape
        if path not in tensors or tuple(tensors[path].shape) != shape:
            found = f"of shape {tuple(tensors[path].shape)}" if path in tensors else "not there"
            raise InputError(f"the adapters change tensor {path} of shape {shape}, which in params is {found}")


def _wrapped(path: str, leaf: Array, tensor: TensorStack, adapters: Array) -> SlottedWeight:
    view = tensor.view
    slots = {"adapters": jnp.tile(adapters, (view.stack, 1)), "groups": tensor.groups}
    return slotted(leaf, view, slots, _AdapterRows(view.out_size), path)


class ServedParameters(NamedTuple):
    """What a `ServedModel` takes for parameters.

    Attributes:
        params: of the base.
        stacked: the adapters.
        adapters: (rows,), the number of every row's adapter; -1 for none.
    """

    params: Parameters
    stacked: Stacked
    adapters: Int[Array, " rows"]


@dataclass(frozen=True)
class ServedModel:
    """A language model whose rows have adapters of their own, for `generate`.

    Attributes:
        model: the language model, as it is.

    Example:
        >>> import jaxsparse as js
        >>> from jaxsparse.models.configs import GPT2Config
        >>> from jaxsparse.models.generate import generate
        >>> model = LanguageModel(
        ...     GPT2Config(vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2)
        ... )
        >>> base = model.init(jax.random.key(0))
        >>> tuned = jax.tree.map(lambda leaf: leaf, base)
        >>> kernel = tuned["layers"]["mlp"]["c_fc"]["kernel"]
        >>> tuned["layers"]["mlp"]["c_fc"]["kernel"] = kernel.at[:, 0].add(1.0)
        >>> stacked = js.deltas.stack({"mine": js.deltas.diff(base, tuned)}, base=base)
        >>> served = ServedModel(model)
        >>> parameters = served.parameters(base, stacked, ["mine", None])
        >>> [len(row) for row in generate(served, parameters, [[1, 2], [3]], max_new_tokens=4, stop_ids=[])]
        [4, 4]
    """

    model: LanguageModel

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def parameters(self, params: Parameters, stacked: Stacked, rows: Sequence[str | int | None]) -> ServedParameters:
        """Returns what the model takes for parameters.

        Args:
            params: of the base.
            stacked: the adapters.
            rows: the name or number of every row's adapter, None for the plain base.

        Raises:
            InputError: there is no such adapter.
        """
        return ServedParameters(params, stacked, jnp.asarray(stacked.numbers(rows)))

    def dtype(self, params: ServedParameters) -> Any:
        """Returns the dtype that the model computes in."""
        return self.model.dtype(params.params)

    def empty_cache(self, batch: int, slots: int, dtype: Any) -> Any:
        """Returns a cache of keys and values with nothing in it."""
        return self.model.empty_cache(batch, slots, dtype)

    def next_logits(self, params: ServedParameters, tokens: Any, positions: Any, cache: Any) -> tuple[Array, Any]:
        """Runs new tokens after those in the cache, every row with its own adapter."""
        return serve(self.model.next_logits)(*params, tokens, positions, cache)
