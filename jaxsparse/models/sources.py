"""Streams tensors out of a file format into a parameter tree, a block at a time."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsparse.common.errors import InputError
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.configs import Config
from jaxsparse.models.layouts import Parameter

__all__ = ["DTYPES", "TensorSource", "TensorSpec", "check_tensors", "load_params", "nest", "parse_dtype"]

# The dtypes that weights may have, here and in files.
DTYPES = ("float32", "bfloat16", "float16")

# How much of a tensor is on the host at a time; the rest is in the file or already in place.
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (its name) of a tensor in a file, as it will be read."""

    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
@runtime_checkable
class TensorSource(Protocol):
    """A model in some file format.

    Attributes:
        where: what messages call it.
        name: what reports call the model.
        config: the model's configuration.
        parameters: the model's parameters, described as this format holds them.
        tensors: every tensor that matters, by the name it has there.
        interleaved: heads are held for interleaved RoPE; ours rotate halves.
    """

    where: str
    name: str
    parameters: list[Parameter]
    tensors: dict[str, TensorSpec]
    interleaved: bool

    @property
    def config(self) -> Config: ...  # noqa: D102 - a property, so that a source may promise one family

    def name_of(self, parameter: Parameter, layer: int) -> str:
        """Returns the name of one layer's tensor."""
        ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to `stop` along axis 0; called for each tensor in order."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """Returns the model's tokenizer, or None where the files have none."""
        ...


def parse_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype of weights by that name.

    Args:
        dtype: anything that JAX takes as a dtype.

    Returns:
        float32, bfloat16 or float16.

    Raises:
        InputError: something else.
    """
    try:
        parsed = jnp.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return parsed


def nest(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the nested dict that has the given leaves at the given paths.

    Args:
        leaves: (path, leaf) pairs.

    Returns:
        The tree.

    Example:
        >>> nest([("mlp/up/kernel", 1), ("mlp/up/bias", 2)])
        {'mlp': {'up': {'kernel': 1, 'bias': 2}}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *folders, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[name] = leaf
    return tree


def load_params(source: TensorSource, dtype: Any = None) -> dict[str, Any]:
    """Reads a whole model; the host holds one block of one tensor beside what is in place already.

    Args:
        source: where its tensors are.
        dtype: float32, bfloat16 or float16; None keeps what the file has.

    Returns:
        The parameter tree, on the default device.

    Raises:
        InputError: a tensor is missing, is one too many, or has another shape or an unusable dtype.
    """
    check_tensors(source)
    # Largest first, so that whatever is needed on the side is needed while little is in place.
    by_size = sorted(source.parameters, key=lambda parameter: -math.prod(parameter.shape))
    loaded = {parameter.path: _load_parameter(parameter, source, dtype) for parameter in by_size}
    return nest((parameter.path, loaded[parameter.path]) for parameter in source.parameters)


def check_tensors(source: TensorSource) -> None:
    """Checks that a source has exactly the tensors that a model needs, before any is read.

    Args:
        source: the model.

    Raises:
        InputError: names the first tensor that is missing, surplus, of another shape or not of floats.
    """
    expected = {source.name_of(p, layer): p.file_shape for p in source.parameters for layer in p.layers}
    missing = [name for name in expected if name not in source.tensors]
    if missing:
        raise InputError(f"{source.where}: tensor {missing[0]} is missing{_and_more(missing)}")
    surplus = [name for name in source.tensors if name not in expected]
    if surplus:
        raise InputError(
            f"{source.where}: tensor {surplus[0]} has no place in this model{_and_more(surplus)}; "
            "the configuration and the weights do not belong together"
        )
    for name, shape in expected.items():
        found = source.tensors[name]
        if found.shape != shape:
            raise InputError(f"{source.where}: tensor {name} should have shape {shape}, has {found.shape}")
        if found.dtype not in DTYPES:
            raise InputError(f"{source.where}: tensor {name} has dtype {found.dtype}; supported: {', '.join(DTYPES)}")


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _load_parameter(parameter: Parameter, source: TensorSource, dtype: Any) -> jax.Array:
    names = [source.name_of(parameter, layer) for layer in parameter.layers]
    found = (jnp.dtype(source.tensors[name].dtype) for name in names)
    target = functools.reduce(jnp.promote_types, found) if dtype is None else parse_dtype(dtype)
    # Filled in place on the device: arrays that merely borrow NumPy's memory cannot be donated later.
    values = jnp.zeros(parameter.shape, target)
    for layer, name in enumerate(names):
        for start, stop in _blocks(parameter, source):
            block = source.read(name, start, stop)
            if source.interleaved and parameter.rotary_heads:
                block = _separate_halves(block, parameter.rotary_heads)
            values = _place(values, block, layer, start, parameter.stacked, parameter.transposed)
            values.block_until_ready()
    return values


def _blocks(parameter: Parameter, source: TensorSource) -> Iterator[tuple[int, int]]:
    """Yields the rows of each block; a tensor whose rows are to be reordered is one block."""
    rows, *rest = parameter.file_shape
    step = max(1, _BLOCK_BYTES // (4 * math.prod(rest)))
    if source.interleaved and parameter.rotary_heads:
        step = rows
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _separate_halves(block: np.ndarray, heads: int) -> np.ndarray:
    """Turns heads laid out for interleaved RoPE (pairs of neighbours) into rotate-half's (pairs half a head apart)."""
    pairs = block.reshape(heads, block.shape[0] // heads // 2, 2, *block.shape[1:])
    return pairs.swapaxes(1, 2).reshape(block.shape)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(4, 5))
def _place(
    values: jax.Array, block: jax.Array, layer: Int[Array, ""], start: Int[Array, ""], stacked: bool, transposed: bool
) -> jax.Array:
    offset: list[Any] = [start, *[0] * (block.ndim - 1)]
    if transposed:
        block, offset = block.T, offset[::-1]
    if stacked:
        block, offset = block[None], [layer, *offset]
    return jax.lax.dynamic_update_slice(values, block.astype(values.dtype), offset)
