"""One row per constructor: every contract test runs on every row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jaxsparse as js


@dataclass(frozen=True)
class Row:
    """A method under test.

    Attributes:
        constructor: takes the inner optimizer first, then keywords.
        options: keywords for every test, targets excluded.
        converging: further options under which the method reaches any optimum (its mask reaches every entry).
        static: the options that set shapes and cannot be injected.
    """

    constructor: Callable[..., Any]
    options: dict[str, Any]
    converging: dict[str, Any]
    static: tuple[str, ...] = field(default=("density", "budget", "targets"))

    @property
    def name(self) -> str:
        return self.constructor.__name__


ROWS = [
    Row(js.gasdu, {"density": 0.5, "refresh_every": 3}, {"density": 0.5, "refresh_every": 1}),
    Row(js.fixed_mask, {"density": 0.5}, {"density": 1.0}),
]
