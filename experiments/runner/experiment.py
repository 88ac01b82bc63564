"""An experiment: a table or figure of a paper, and what makes it again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.runner.bench import Bench

__all__ = ["Experiment"]


@dataclass(frozen=True)
class Experiment:
    """A table or figure of a paper.

    Attributes:
        name: paper and experiment, such as "gasdu/refresh_interval".
        shows: what of the paper it makes again, such as "GASDU, table 3".
        question: what it asks, in a line.
        run: does it: trials by the bench, then tables, pictures and findings into `bench.report`.
        folder: where its `config.yaml` lies, and what the paper printed.
    """

    name: str
    shows: str
    question: str
    run: Callable[[Bench], None]
    folder: Path

    @property
    def config(self) -> Path:
        """Its settings."""
        return self.folder / "config.yaml"
