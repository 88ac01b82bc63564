"""The shapes on which kernels are tested, compiled and measured: those of well-known models, and small odd ones."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxsparse.models.layouts import parameters_of
from jaxsparse.models.presets import PRESETS

__all__ = ["DATA", "NEURONS", "PROJECTIONS", "SMALL", "Projection", "Small", "projections"]


@dataclass(frozen=True)
class Projection:
    """A weight matrix of a model, and the tokens of a batch.

    Attributes:
        model: a name in `PRESETS`.
        name: its place in a layer; the first where several have its shape.
        tokens: tokens of a batch.
        inputs: width of what it takes.
        outputs: width of what it gives.
    """

    model: str
    name: str
    tokens: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.model} {self.name}"

    def entries(self, density: float) -> int:
        """Returns how many entries are a share of it; one at least."""
        return max(1, round(self.inputs * self.outputs * density))


def projections(model: str, tokens: int) -> list[Projection]:
    """Returns the projections of a model's layer, one of each shape."""
    found: dict[tuple[int, ...], Projection] = {}
    for parameter in parameters_of(PRESETS[model]):
        layer, _, name = parameter.path.removesuffix("/kernel").partition("/")
        if layer == "layers" and parameter.path.endswith("/kernel"):
            inputs, outputs = parameter.shape[1:]
            found.setdefault((inputs, outputs), Projection(model, name, tokens, inputs, outputs))
    return list(found.values())


# Batches of the papers where they say (GASDU on LLaMA-2-7B: 4 rows of 768 tokens).
PROJECTIONS = [
    *projections("llama2-7b", 3072),
    *projections("llama3-8b", 3072),
    *projections("smollm2-135m", 512),
    *projections("gpt2", 1024),
]
"""Full size: compiled for accelerators, and measured."""


@dataclass(frozen=True)
class Small:
    """Arguments on which numbers are compared.

    Attributes:
        tokens: rows of x and of dy.
        inputs: columns of x.
        outputs: columns of dy.
        k: entries of the answer.
        dtype: of x and dy.
        data: a name in `DATA`: what they hold.
    """

    tokens: int
    inputs: int
    outputs: int
    k: int
    dtype: str = "float32"
    data: str = "whole"

    def __str__(self) -> str:
        return f"{self.tokens}x{self.inputs}x{self.outputs}-k{self.k}-{self.dtype}-{self.data}"

    def arrays(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns random x and dy, which their dtype holds exactly."""
        x, dy = (DATA[self.data](rng, (self.tokens, width)) for width in (self.inputs, self.outputs))
        return x.astype(jnp.dtype(self.dtype)), dy.astype(jnp.dtype(self.dtype))


def _with(value: float) -> Callable[[np.random.Generator, tuple[int, int]], np.ndarray]:
    """Whole numbers, zeros among them, and the value here and there: one column in four has it."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        numbers = rng.integers(-2, 3, shape).astype(float)
        columns = rng.permutation(shape[1])[: -(-shape[1] // 4)]
        numbers[rng.integers(0, shape[0], columns.size), columns] = value
        return numbers

    return draw


DATA: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    # Whole numbers that bf16 holds, whose sums of products float32 holds: any order of adding gives the same bits.
    "whole": lambda rng, shape: rng.integers(-120, 121, shape).astype(float),
    "ties": lambda rng, shape: rng.integers(-1, 2, shape).astype(float),
    "zero": lambda rng, shape: np.zeros(shape),
    "inf": _with(np.inf),
    "nan": _with(np.nan),
}
"""What arrays hold, by name: from a generator and a shape."""

SMALL = [
    Small(1, 1, 1, 1),
    Small(5, 13, 37, 7, "bfloat16"),
    Small(3, 9, 31, 1),
    Small(7, 33, 65, 33 * 65),
    Small(2, 8, 16, 8 * 16, "bfloat16", "ties"),
    Small(70, 130, 257, 1, "bfloat16"),
    Small(70, 130, 257, 40, "bfloat16"),
    Small(70, 130, 257, 2000, "float32"),
    Small(64, 128, 256, 300, "float32"),
    Small(3, 130, 70, 50, "float32", "ties"),
    Small(3, 70, 270, 900, "bfloat16", "ties"),
    Small(4, 90, 70, 11, "float32", "zero"),
    Small(5, 70, 140, 900, "float32", "inf"),
    Small(5, 70, 140, 70, "bfloat16", "inf"),
    Small(5, 130, 60, 800, "float32", "nan"),
    Small(5, 60, 130, 9, "bfloat16", "nan"),
]
"""Odd sizes, tokens that are no multiple of a block, one and all entries, ties, and numbers that are none."""

NEURONS = [Small(70, 13, 5, 13, "bfloat16"), Small(3, 301, 11, 2, "bfloat16"), Small(5, 9, 37, 1), Small(1, 1, 1, 1)]
"""The same where k counts the entries of every output: all of them, few of many, one, and one of one."""
