"""What an experiment is run with: its config.yaml, one part for every scale."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.suites import TrainFrom

__all__ = ["SCALES", "Scale", "Settings", "load_settings"]

Scale = Literal["tiny", "small", "paper"]
SCALES: tuple[Scale, ...] = ("tiny", "small", "paper")


@dataclass(frozen=True)
class Settings:
    """What the trials of an experiment have in common, and what they differ in.

    Attributes:
        model: a known name or a path; "tiny-base" is pre-trained by the runner.
        tasks: names of tasks, see `jaxsparse.evaluate.suites`.
        methods: from the label that tables show to the method's own options, and `method`, its name; a label that is
            a method's name needs none. Keys that are fields of `Settings`, such as `lr`, hold for that method alone.
        steps: optimizer steps of a trial; None: `epochs` decides.
        epochs: passes over the training rows.
        lr: learning rates; more than one is a grid that stage one searches.
        batch: rows of a batch; more than one likewise.
        search_epochs: passes of a trial of stage one (GASDU, section 5: 1).
        search_steps: its optimizer steps instead.
        seeds: trials that differ by their seed alone; medians over them are reported.
        train_rows: so many of the first training rows; None: all.
        dev_rows: so many of the first rows that stage one is judged on.
        test_rows: so many of the first test rows.
        train_from: a task's "own" training rows, or those of its whole "suite", see `load_task`.
        max_length: longest row in tokens.
        max_new_tokens: longest generated answer in tokens.
        train_on: the field that the model learns to write.
        optimizer: adam or adamw.
        schedule: constant, linear or cosine.
        warmup_steps: steps over which the rate rises.
        clip: largest global norm of the slots' gradient; 0: none.
        weight_decay: for adamw.
        targets: pattern of the weights that may move; None: the attention projections.
        dtype: of the weights.
        engine: "fused", or "reference", which knows the retention of every step and not of refreshing ones alone.
        device: what the paper's scale is planned for where it cannot run.
        more: what this experiment alone knows.
    """

    model: str
    tasks: tuple[str, ...] = ()
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int | None = None
    epochs: float | None = None
    lr: tuple[float, ...] = (1e-4,)
    batch: tuple[int, ...] = (8,)
    search_epochs: float = 1.0
    search_steps: int | None = None
    seeds: int = 3
    train_rows: int | None = None
    dev_rows: int | None = None
    test_rows: int | None = None
    train_from: TrainFrom = "own"
    max_length: int = 512
    max_new_tokens: int = 24
    train_on: Literal["answer", "output"] = "answer"
    optimizer: str = "adam"
    schedule: str = "constant"
    warmup_steps: int = 0
    clip: float = 1.0
    weight_decay: float = 0.0
    targets: str | None = None
    dtype: str = "float32"
    engine: str = "fused"
    device: str = "h100"
    more: dict[str, Any] = field(default_factory=dict)


def load_settings(file: Path, scale: Scale) -> Settings:
    """Reads the settings of one scale: those of the part `all`, and over them the scale's own.

    Args:
        file: a YAML file with the parts `all`, `tiny`, `small` and `paper`; `more` and `methods` are merged key by
            key, but that a scale's own `methods` replace those of `all`.
        scale: which part.

    Returns:
        The settings.

    Raises:
        InputError: the file has no such part, or an option that nobody knows.
    """
    parts = yaml.safe_load(file.read_text(encoding="utf-8"))
    if scale not in parts:
        raise InputError(f"{file} has no part {scale!r}; it has {', '.join(parts)}")
    shared, own = parts.get("all") or {}, parts[scale] or {}
    merged = shared | own | {"more": (shared.get("more") or {}) | (own.get("more") or {})}
    known = {each.name for each in dataclasses.fields(Settings)}
    if unknown := set(merged) - known:
        raise InputError(f"{file}, {scale}: unknown options {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    for name in ("tasks", "lr", "batch"):
        if name in merged:
            merged[name] = _several(merged[name])
    merged["methods"] = {label: options or {} for label, options in (merged.get("methods") or {}).items()}
    return Settings(**merged)


def _several(value: Any) -> tuple[Any, ...]:
    """A list as a tuple; a single value as a tuple of one. YAML reads 1e-4 as text: numbers become numbers."""
    values = value if isinstance(value, list) else [value]
    return tuple(_number(each) for each in values)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
