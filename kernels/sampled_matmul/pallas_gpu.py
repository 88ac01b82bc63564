"""Entries of x.T @ dy on a GPU: a program takes some samples and tokens, and multiplies what it gathers."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.blocks import inside, power_of_2
from jaxsparse.kernels.launch import triton_call
from jaxtyping import Array, Float, Int

__all__ = ["Tiling", "sampled_matmul_gpu", "tiling"]

TRANSPOSED_COST = 1 / 4
"""To transpose a feature costs as much as to read so many features that lie across the tokens."""


@dataclass(frozen=True)
class Tiling:
    """How the samples are shared out.

    Attributes:
        samples: of a program.
        tokens: read at a time.
        programs: tokens are split until there are so many.
        transposed: gather from x.T and dy.T, where the tokens of a feature lie together, rather than from x and dy.
        warps: of a program.
        stages: how deeply reading is pipelined.
    """

    samples: int
    tokens: int
    programs: int = 1024
    transposed: bool = True
    warps: int = 4
    stages: int = 3


def tiling(x: Any, dy: Any, samples: int) -> Tiling:
    """Returns the tiling for arrays like these and so many samples."""
    transposed = samples > TRANSPOSED_COST * (x.shape[1] + dy.shape[1])
    tokens = min(64 if transposed else 16, power_of_2(x.shape[0]))
    return Tiling(2048 // tokens if transposed else 128, tokens, transposed=transposed)


def sampled_matmul_gpu(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    rows: Int[Array, "..."],
    columns: Int[Array, " samples"] | None = None,
    *,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "..."]:
    """Returns sum_t x[t, rows[j]] dy[t, columns[j]]; samples in the order of their rows share what they read of x.

    Args:
        x: activations.
        dy: cotangents of the outputs.
        rows: columns of x, (samples,); without columns (k, outputs), of every output.
        columns: columns of dy.
        interpret: run it as plain JAX.
        cut: how the samples are shared out; None: `tiling`.
    """
    samples, tokens = rows.size, x.shape[0]
    cut = cut or tiling(x, dy, samples)
    # Those of one output together share what they read of dy.
    index = (rows.T.reshape(-1),) if columns is None else (rows, columns)
    blocks, steps = pl.cdiv(samples, cut.samples), pl.cdiv(tokens, cut.tokens)
    steps = pl.cdiv(steps, min(steps, pl.cdiv(cut.programs, blocks)))
    splits = pl.cdiv(pl.cdiv(tokens, cut.tokens), steps)
    (sums,) = triton_call(
        partial(_kernel, cut=cut, steps=steps, sizes=(samples, tokens, x.shape[1], dy.shape[1])),
        (*((x.T, dy.T) if cut.transposed else (x, dy)), *index),
        name="sampled_matmul",
        grid=(blocks, splits),
        results=(((splits, samples), jnp.float32),),
        interpret=interpret,
        warps=cut.warps,
        stages=cut.stages,
    )
    found = jnp.sum(sums, axis=0)
    return found.reshape(rows.T.shape).T if columns is None else found


def _kernel(x: Any, dy: Any, rows: Any, *rest: Any, cut: Tiling, steps: int, sizes: tuple[int, ...]) -> None:
    *columns, sums = rest
    samples, tokens, inputs, outputs = sizes
    sample, split = pl.program_id(0) * cut.samples + jnp.arange(cut.samples), pl.program_id(1)
    is_sample = sample < samples

    def read(index: Any) -> Array:
        return plgpu.load(index.at[sample], mask=is_sample, other=0)

    row = inside(read(rows), inputs)
    column = inside(read(columns[0]), outputs) if columns else inside(sample // (samples // outputs), outputs)

    def across(features: Array, tokens: Array) -> tuple[Array, Array]:
        if cut.transposed:
            return features[:, None], tokens[None, :]
        return tokens[:, None], features[None, :]

    def add(step: Array, total: Array) -> Array:
        token = (split * steps + step) * cut.tokens + jnp.arange(cut.tokens)
        first, second = across(is_sample, token < tokens)
        exists = first & second
        left = plgpu.load(x.at[across(row, token)], mask=exists, other=0.0)
        right = plgpu.load(dy.at[across(column, token)], mask=exists, other=0.0)
        return total + left.astype(jnp.float32) * right.astype(jnp.float32)

    shape = (cut.samples, cut.tokens) if cut.transposed else (cut.tokens, cut.samples)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros(shape, jnp.float32))
    plgpu.store(sums.at[split, sample], jnp.sum(total, axis=1 if cut.transposed else 0), mask=is_sample)
