"""One row per constructor: every contract test runs on every row."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import pytest

import jaxsparse as js


@dataclass(frozen=True)
class Row:
    """A method under test.

    Attributes:
        constructor: takes the inner optimizer first, then keywords.
        options: keywords for every test, targets excluded; they fit matrices of 2 x 3 and 5 x 2, of which the latter
            may be five layers of vectors.
        converging: options under which the method reaches any optimum, since its mask reaches every entry; None:
            there are none.
        looks: first steps that change nothing.
        injectable: the options that may be traced; all others set shapes.
        targets: all matrices, unless the method asks for more than a pattern.
        filled: slots may be filled up with entries that are no weights.
        slots: how many numbers a matrix of (in, out) trains; None: one for every weight that moves.
        dense: all targets move as a whole.
        mirrors: the fields of the state that mirror the parameters.
        rounds: `init` warns that weights narrower than float32 round its steps away.
        own: the constructor brings its own optimizer, and takes a learning rate where others take one.
        moments: the mean and the mean square of an Adam that has run.
    """

    constructor: Callable[..., Any]
    options: dict[str, Any]
    converging: dict[str, Any] | None = None
    looks: int = 0
    injectable: tuple[str, ...] = ()
    targets: Any = ".*"
    filled: bool = False
    slots: Callable[[int, int], int] | None = None
    dense: bool = False
    mirrors: tuple[str, ...] = ("support", "master")
    rounds: bool = False
    own: bool = False
    moments: Callable[[Any], Any] = lambda state: (state.inner[0].mu, state.inner[0].nu)

    @property
    def name(self) -> str:
        return self.constructor.__name__

    def warning(self, dtype: Any) -> AbstractContextManager[Any]:
        """Expects what `init` has to say of weights of a dtype."""
        if self.rounds and jnp.dtype(dtype).itemsize < 4:
            return pytest.warns(UserWarning, match="round most of a small one away")
        return nullcontext()

    @property
    def static(self) -> tuple[str, ...]:
        """What `optax.inject_hyperparams` must leave alone."""
        shapes = {*self.options, "density", "budget", "neurons", "targets", "epsilon", "gradients"} - {*self.injectable}
        return tuple(shapes & {*inspect.signature(self.constructor).parameters})


# Updates of low-rank methods are dense, and what trains are the factors.
LowRankRow = partial(Row, slots=lambda inputs, outputs: inputs + outputs, mirrors=("factors", "norms"), rounds=True)

# Two parts side by side: what lies outside the stack of layers, and the layers drawn.
LISA_ROW = Row(
    js.lisa,
    {"layers": 2, "every": 2},
    {"layers": 5, "every": 40},
    mirrors=tuple(f"{part}.{name}" for part in ("outside", "drawn") for name in ("support", "master")),
    moments=lambda state: [(adam.mu, adam.nu) for adam in (state.outside.inner[0], state.drawn.inner[0])],
)

ROWS = [
    Row(
        js.gasdu,
        {"density": 0.5, "refresh_every": 3},
        {"density": 0.5, "refresh_every": 1},
        injectable=("refresh_every",),
    ),
    Row(js.fixed_mask, {"density": 0.5}, {"density": 1.0}),
    Row(js.sift, {"density": 0.5}, {"density": 1.0}, looks=1),
    Row(js.saft, {"density": 0.5, "calibration_steps": 1}, {"density": 1.0}, looks=1),
    Row(js.gallop, {"density": 0.5, "calibration_steps": 1}, {"density": 1.0}, looks=1),
    Row(js.super_tuning, {"density": 0.5}, {"density": 1.0}),
    Row(js.shira, {"rank": 1}),
    Row(js.neuroada, {"k": 1}),
    Row(js.cla, {"rank": 1}),
    Row(js.r_cla, {"rank": 1}),
    Row(js.c3la, {"rank": 1, "chain_every": 2}, {"rank": 2, "chain_every": 40}),
    Row(js.r_c3la, {"rank": 1, "chain_every": 2}, {"rank": 2, "chain_every": 40}),
    Row(js.paca, {"rank": 1}),
    Row(js.d_paca, {"rank": 1}),
    Row(
        js.s2ft,
        {"output": None, "down": None, "calibration_steps": 0},
        targets=[js.Target(".*", subspace=js.subspaces.Slices(1))],
    ),
    Row(js.c_paca, {"rank": 1, "chain_every": 2}, {"rank": 2, "chain_every": 40}),
    Row(js.full, {}, {}, dense=True),
    Row(js.bitfit, {}, {}, dense=True),
    LISA_ROW,
    LowRankRow(js.lora, {"rank": 1}, {"rank": 2}),
    LowRankRow(js.lora_plus, {"rank": 1, "ratio": 16.0}),
    LowRankRow(js.cola, {"rank": 1, "chain_every": 2}, {"rank": 2, "chain_every": 200}),
    LowRankRow(js.asym_lora, {"rank": 1}, slots=lambda inputs, outputs: outputs),
    LowRankRow(js.rac_lora, {"rank": 1, "chain_every": 2}, slots=lambda inputs, outputs: outputs),
    LowRankRow(js.dora, {"rank": 1}, {"rank": 2}, slots=lambda inputs, outputs: inputs + 2 * outputs),
    LowRankRow(js.lora_ga, {"rank": 1, "gamma": 16.0, "calibration_steps": 1}, looks=1),
    LowRankRow(js.lora_one, {"rank": 1, "gamma": 128.0, "calibration_steps": 1}, {"rank": 2}, looks=1),
    Row(
        js.smt,
        {"blocks": 2, "size": 2, "calibration_steps": 1},
        {"blocks": 5, "calibration_steps": 1},
        looks=1,
        filled=True,
    ),
    Row(
        js.spiel,
        {"density": 0.5, "budget": None, "total_steps": 30, "reselect_every": 3, "accumulation_steps": 2},
        {"density": 1.0},
        mirrors=("support", "delta", "base", "optimizer", "candidates", "left"),
        own=True,
        moments=lambda state: (state.optimizer.mean, state.optimizer.square),
    ),
]
