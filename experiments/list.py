"""Lists the experiments: what of which paper each makes again."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from experiments.catalogue import chosen
from experiments.tables import show
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported


@dataclass(frozen=True)
class ListConfig:
    """Lists the experiments of the papers; `python -m experiments.run NAME` runs one.

    Example: python -m experiments.list
    """

    of: str = "all"
    """A paper (gasdu, neuroada, s2ft, beyond_lora, gallop), an experiment, or all."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


def main(arguments: Sequence[str]) -> int:
    """Prints the list."""
    config = parse(lambda given: ListConfig, "python -m experiments.list", arguments)
    rows = [{"name": each.name, "shows": each.shows, "question": each.question} for each in chosen(config.of)]
    if config.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table("name", "of the paper", "what it asks")
    for row in rows:
        table.add_row(*row.values())
    show(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(reported("experiments.list", lambda: main(sys.argv[1:])))
