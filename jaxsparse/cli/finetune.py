"""`jaxsparse finetune`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import Stopped
from jaxsparse.common.hosts import AgreedError
from jaxsparse.methods.registry import options_class
from jaxsparse.train.cluster import join, leave, watched
from jaxsparse.train.config import ClusterConfig, FinetuneConfig
from jaxsparse.train.finetune import finetune
from jaxsparse.train.report import Report

__all__ = ["main", "show"]


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments, runs, and prints the report."""
    config = parse(_config_class, "jaxsparse finetune", arguments)
    alone = config.cluster == ClusterConfig()
    return _run(config) if alone else watched(lambda: reported("finetune", lambda: _run(config)))


def _run(config: FinetuneConfig[Any]) -> int:
    join(config.cluster)
    try:
        report = finetune(config)
    except (AgreedError, Stopped):
        leave()
        raise
    leave()
    if report is None:  # the first process tells
        return 0
    show(report, as_json=config.json)
    return 0 if report.bit_identical else 1


def _config_class(given: dict[str, Any]) -> Any:
    """The configuration with the options of the method that is asked for."""
    return FinetuneConfig[options_class(given.get("method", "gasdu"))]  # type: ignore[misc]


def show(report: Report, *, as_json: bool) -> None:
    """Prints a report to standard output, as a table or as JSON."""
    if as_json:
        json.dump(dataclasses.asdict(report), sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        Console(soft_wrap=True).print(report.table())
