"""The folder of a run: its configuration, and whether a run may start or go on there."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text, check_writable
from jaxsparse.train.config import FinetuneConfig

__all__ = ["flat_options", "open_run_folder"]

# What may differ when a run goes on: nothing that the weights depend on.
_FREE_TO_CHANGE = {"resume", "json", "tensorboard", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "out"}


def flat_options(config: Any) -> dict[str, Any]:
    """Returns a configuration as one flat mapping from option to value, as a config file holds it.

    Example:
        >>> from jaxsparse.train.config import OptimizerConfig
        >>> flat_options(OptimizerConfig(lr=0.5))["lr"]
        0.5
    """
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flat_options(value)
        else:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat


def open_run_folder(config: FinetuneConfig) -> None:
    """Checks that a run may write to its folder, and writes down its configuration.

    Raises:
        InputError: the folder cannot be written, holds a run that is not to be resumed, or holds one whose
            configuration differs.
    """
    run = config.run
    check_writable(run.out)
    written = run.out / "config.yaml"
    options = flat_options(config)
    if written.exists():
        if not run.resume:
            raise InputError(f"{run.out} holds a run already; --resume goes on with it, or give another --out")
        before = yaml.safe_load(written.read_text())
        changed = [name for name in options if name not in _FREE_TO_CHANGE and options[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise InputError(
                f"{run.out} was run with {name}={before.get(name)!r}, not {options[name]!r}; "
                "resume with the same options, or give another --out"
            )
    atomic_write_text(written, yaml.safe_dump(options, sort_keys=False))
