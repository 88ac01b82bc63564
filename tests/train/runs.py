"""Runs of the command on the tiny model, shared by this folder's tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxsparse import deltas
from jaxsparse.cli.main import main
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.models.checkpoints import load


def arguments(model: Path, files: dict[str, Path], out: Path, **options: Any) -> list[str]:
    given = {"model": model, "data": files["train"], "out": out, "density": 0.02, "refresh-every": 3, "steps": 8}
    given |= {"lr": 0.01, "batch": 4, "max-length": 128, "template": "plain", "max-new-tokens": 4} | options
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def finetune(*args: Any, **options: Any) -> int:
    return main(["finetune", *arguments(*args, **options)])


def weights(model: Path, delta: Path) -> dict[str, np.ndarray]:
    base = load(model)
    tuned = deltas.apply(base.params, deltas.load(delta, base=base.params))
    return {path: np.asarray(leaf) for path, leaf in flatten_with_paths(tuned)[0]}


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
