"""One row per constructor: every contract test runs on every row."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jaxsparse as js


@dataclass(frozen=True)
class Row:
    """A method under test.

    Attributes:
        constructor: takes the inner optimizer first, then keywords.
        options: keywords for every test, targets excluded; they fit matrices of 2 x 3 and 5 x 2.
        converging: options under which the method reaches any optimum, since its mask reaches every entry; None:
            there are none.
        looks: first steps that change nothing.
        injectable: the options that may be traced; all others set shapes.
        filled: slots may be filled up with entries that are no weights.
    """

    constructor: Callable[..., Any]
    options: dict[str, Any]
    converging: dict[str, Any] | None = None
    looks: int = 0
    injectable: tuple[str, ...] = ()
    filled: bool = False

    @property
    def name(self) -> str:
        return self.constructor.__name__

    @property
    def static(self) -> tuple[str, ...]:
        """What `optax.inject_hyperparams` must leave alone."""
        shapes = {*self.options, "density", "budget", "targets", "epsilon", "gradients"} - {*self.injectable}
        return tuple(shapes & {*inspect.signature(self.constructor).parameters})


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
    Row(js.c_paca, {"rank": 1, "chain_every": 2}, {"rank": 2, "chain_every": 40}),
    Row(
        js.smt,
        {"blocks": 2, "size": 2, "calibration_steps": 1},
        {"blocks": 5, "calibration_steps": 1},
        looks=1,
        filled=True,
    ),
]
