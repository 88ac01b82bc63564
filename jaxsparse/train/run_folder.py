"""The folder of a run: its configuration, and whether a run may start or go on there."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import yaml

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text, check_writable
from jaxsparse.models.sharding import tensor_parts
from jaxsparse.train.config import FinetuneConfig, ModelConfig

__all__ = ["check_run_folder", "flat_options", "open_run_folder"]

# No part of a run: how one call of the command goes about it.
_OF_THE_CALL = {
    *("resume", "json", "distributed", "coordinator", "processes", "process", "heartbeat_seconds", "wait_seconds")
}
# What may differ when a run goes on: nothing that the weights depend on.
_FREE_TO_CHANGE = {"mesh", "tensorboard", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "out"}


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
        elif field.name not in _OF_THE_CALL:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat


def _defaults(config: Any) -> dict[str, Any]:
    """The options that have a default, at their defaults."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= _defaults(value)
        elif field.default is not dataclasses.MISSING:
            flat[field.name] = str(field.default) if isinstance(field.default, Path) else field.default
    return flat


def check_run_folder(config: FinetuneConfig) -> None:
    """Checks that a run may write to its folder. Writes nothing.

    Raises:
        InputError: the folder cannot be written, holds a run that is not to be resumed, or holds one whose
            configuration or data differ.
    """
    out = config.run.out
    check_writable(out)
    if not (out / "config.yaml").exists():
        return
    if not config.run.resume:
        raise InputError(f"{out} holds a run already; --resume goes on with it, or give another --out")
    # An option that is younger than the run was at its default.
    options, before = flat_options(config), _defaults(config) | _read_options(out / "config.yaml")
    for name, value in options.items():
        if name not in _FREE_TO_CHANGE and value != before.get(name):
            raise InputError(
                f"{out} was run with {name}={before.get(name)!r}, not {value!r}; "
                "resume with the same options, or give another --out"
            )
    _check_mesh(config.base, before.get("mesh"), out)
    record = out / "data.sha256"
    if record.exists():
        recorded = [line.split(" ")[0] for line in record.read_text(encoding="utf-8", errors="replace").splitlines()]
        for file, now, then in zip(_data_files(config), _checksums(config), recorded, strict=False):
            if now != then:
                raise InputError(f"{file} has changed since the run in {out} began; restore it, or give another --out")


def open_run_folder(config: FinetuneConfig) -> None:
    """Writes a run's configuration to its folder, and the checksums of its data.

    Raises:
        InputError: as `check_run_folder`.
    """
    check_run_folder(config)
    out = config.run.out
    lines = [f"{checksum}  {file}\n" for file, checksum in zip(_data_files(config), _checksums(config), strict=True)]
    atomic_write_text(out / "data.sha256", "".join(lines))
    atomic_write_text(out / "config.yaml", yaml.safe_dump(flat_options(config), sort_keys=False))


def _check_mesh(base: ModelConfig, before: str | None, out: Path) -> None:
    """Every tensor shard's picks lie in its own part of the weights: other parts would need other picks."""
    now, then = tensor_parts(base.mesh), tensor_parts(before)
    if base.selection == "per_shard" and now != then:
        raise InputError(
            f"{out} was run with tensor={then}, whose shards each picked their own entries, not tensor={now}; resume "
            "with the same tensor axis (data and fsdp may change), or start with --selection global"
        )


def _read_options(file: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged: {' '.join(str(error).split())}; give another --out") from error
    if not isinstance(options, dict):
        raise InputError(f"{file} is damaged: it holds no options; give another --out")
    return options


def _data_files(config: FinetuneConfig) -> list[Path]:
    return [file for file in (config.rows.data, config.rows.eval_data) if file is not None]


def _checksums(config: FinetuneConfig) -> list[str]:
    """The SHA-256 of every data file, as `sha256sum` prints them."""
    found = []
    for file in _data_files(config):
        with file.open("rb") as opened:
            found.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return found
