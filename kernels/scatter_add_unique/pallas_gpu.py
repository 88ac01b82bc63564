"""Scatters on a GPU: w's memory is the result's, and only its entries at the indices are touched."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.blocks import power_of_2
from jaxsparse.kernels.launch import triton_call
from jaxtyping import Array, Int, Num

__all__ = ["Tiling", "scatter_gpu"]


@dataclass(frozen=True)
class Tiling:
    """How the entries are shared out.

    Attributes:
        entries: of a program.
        warps: of a program.
    """

    entries: int = 256
    warps: int = 4


def scatter_gpu(
    w: Num[Array, "stack size"],
    index: Int[Array, "stack k"],
    values: Num[Array, "stack k"],
    *,
    adds: bool,
    interpret: bool,
    cut: Tiling | None = None,
) -> Num[Array, "stack size"]:
    """Returns w with its entries at `index` replaced by values, or by their sums with what was there.

    Args:
        w: matrices.
        index: flat indices, distinct in a matrix; those beyond it are left out.
        values: what the entries are to be, or what is added.
        adds: which of the two.
        interpret: run it as plain JAX.
        cut: how the entries are shared out.
    """
    (stack, size), k = w.shape, index.shape[1]
    cut = cut or Tiling(min(256, power_of_2(k)))
    return triton_call(
        partial(_kernel, cut=cut, adds=adds, size=size, k=k),
        (w, index, values),
        name="scatter_add_unique" if adds else "scatter_unique",
        grid=(pl.cdiv(k, cut.entries), stack),
        results=((w.shape, w.dtype),),
        interpret=interpret,
        warps=cut.warps,
        aliases={0: 0},
    )[0]


def _kernel(_: Any, index: Any, values: Any, w: Any, *, cut: Tiling, adds: bool, size: int, k: int) -> None:
    entry, matrix = pl.program_id(0) * cut.entries + jnp.arange(cut.entries), pl.program_id(1)
    is_entry = entry < k
    place = plgpu.load(index.at[matrix, entry], mask=is_entry, other=-1)
    is_place = (place >= 0) & (place < size)
    # Lanes that are idle must not share a place with one that is not: see tests/kernels/test_traps.py.
    place = jnp.where(is_place, place, size)
    value = plgpu.load(values.at[matrix, entry], mask=is_entry, other=0)
    if adds:
        old = plgpu.load(w.at[matrix, place], mask=is_place, other=0)
        value = (old.astype(jnp.float32) + value.astype(jnp.float32)).astype(w.dtype)
    plgpu.store(w.at[matrix, place], value, mask=is_place)
