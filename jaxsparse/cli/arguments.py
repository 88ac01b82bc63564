"""Flags and config files, both made from one dataclass."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from jaxsparse.common.errors import InputError
from jaxsparse.methods.registry import options_class

__all__ = ["parse"]


def parse(config_class: Callable[[dict[str, Any]], Any], prog: str, arguments: Sequence[str]) -> Any:
    """Makes a configuration from command-line arguments and a config file.

    `--config FILE` names a YAML or JSON file that maps option names to values; flags win over it.

    Args:
        config_class: from the options known so far (those of the file, and `method`) to the dataclass to fill.
        prog: how the command is called, for `--help`.
        arguments: the command line without the command.

    Returns:
        The dataclass, filled.

    Raises:
        InputError: the config file is no mapping of options.
        SystemExit: from tyro, on `--help` or a wrong flag.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--method")
    known, _ = early.parse_known_args(arguments)
    written = _read(known.config) if known.config else {}
    if known.method:
        written = _without_other_method(written, known.method)
    flags = [flag for name, value in written.items() for flag in _as_flags(name, value)]
    rest = _without_config(arguments)
    return tyro.cli(
        config_class(written),
        prog=prog,
        args=[*flags, *rest],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is no YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise InputError(f"--config {path} must map option names to values, such as `lr: 1e-4`")
    for name, value in options.items():
        if isinstance(value, list | dict | set):
            raise InputError(f"--config {path}: {name} must be one value, got {value!r}")
    return options


def _without_other_method(options: dict[str, Any], method: str) -> dict[str, Any]:
    """A file's options for another method: the own options of the file's method mean nothing to that."""

    def own(name: str) -> set[str]:
        return {field.name for field in dataclasses.fields(options_class(name))}

    foreign = own(options.get("method", "gasdu")) - own(method)
    kept = {name: value for name, value in options.items() if str(name).replace("-", "_") not in foreign}
    return kept | {"method": method}


def _as_flags(name: str, value: Any) -> list[str]:
    flag = "--" + str(name).replace("_", "-")
    if isinstance(value, bool):
        return [flag] if value else []
    return [f"{flag}={value}"]


def _without_config(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--config FILE`, which tyro does not know."""
    rest, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--config":
            skip = True
        elif not argument.startswith("--config="):
            rest.append(argument)
    return rest
