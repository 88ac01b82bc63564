"""Checkpoints of a run: all that is needed to go on as if nothing had happened.

A checkpoint is a folder `step_00000100` that appears whole or not at all. It holds the weights as a delta against the
base, the method's state, the data iterator's state and the run's totals.
"""

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxsparse import deltas
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_folder
from jaxsparse.common.hosts import agreed, alone, on_all, on_first

__all__ = ["RunCheckpoint", "remove_unfinished", "restore_newest", "save_checkpoint"]

_FOLDER = "step_{:08d}"
_PATTERN = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class RunCheckpoint:
    """A run at the end of a step.

    Attributes:
        step: optimizer steps done.
        delta: the weights of the state that may move, against the base: of a low-rank method in the fused engine those
            that are frozen beside the factors.
        method_state: the method's state, a pytree of arrays.
        data_state: the data iterator's state, as JSON can hold it.
        totals: sums for the report, as JSON can hold them.
    """

    step: int
    delta: deltas.Delta
    method_state: Any
    data_state: dict[str, Any]
    totals: dict[str, Any]


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves under their number; the tree's own structure is made anew on restoring, never stored."""
    return {f"{number:04d}": leaf for number, leaf in enumerate(jax.tree.leaves(tree))}


def save_checkpoint(folder: Path, checkpoint: RunCheckpoint, *, keep: int) -> Path:
    """Saves a checkpoint and then removes the oldest ones.

    Args:
        folder: where the run's checkpoints lie.
        checkpoint: what to save.
        keep: how many of the newest stay, at least 1.

    Returns:
        The new checkpoint's folder.

    Raises:
        InputError: it cannot be written; earlier checkpoints are untouched.
    """
    target = folder / _FOLDER.format(checkpoint.step)
    with atomic_folder(target, overwrite=True) as temporary:
        deltas.save(temporary / "delta", checkpoint.delta)
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
                checkpointer.save((temporary / "state").resolve(), _named_leaves(checkpoint.method_state))
        except Exception as error:  # Orbax and TensorStore report a full disk by whatever it made them trip over
            raise InputError(f"cannot write checkpoint {target}: {_first_line(error)}") from error
        run = {"step": checkpoint.step, "data": checkpoint.data_state, "totals": checkpoint.totals}
        (temporary / "run.json").write_text(json.dumps(run))
    # Later ones are damaged, or this run would have gone on from them: they must not push out what was just saved.
    for old in [step for step in _steps(folder) if step <= checkpoint.step][keep:]:
        shutil.rmtree(folder / _FOLDER.format(old), ignore_errors=True)
    return target


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed run was about to write.

    Args:
        folder: where the run's checkpoints lie; it need not exist.
    """
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = (_PATTERN.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def restore_newest(folder: Path, method_state: Any, *, base_fingerprint: str) -> RunCheckpoint | None:
    """Restores the newest checkpoint that is whole; damaged ones are reported and passed over.

    Of several processes the first one decides which that is, as only it sees for certain all that it wrote.

    Args:
        folder: where the run's checkpoints lie.
        method_state: a state of the structure, shapes and dtypes to restore.
        base_fingerprint: of the base that the deltas must belong to.

    Returns:
        The checkpoint, or None where there is none.

    Raises:
        InputError: there are checkpoints, and none can be used; or another process cannot read the chosen one.
    """
    found = on_first(lambda: _newest(folder, method_state, base_fingerprint))
    step = agreed(-1 if found is None else found.step)
    if step < 0:
        return None
    return on_all(lambda: found or _restore(folder / _FOLDER.format(step), method_state, base_fingerprint))


def _newest(folder: Path, method_state: Any, base_fingerprint: str) -> RunCheckpoint | None:
    problems = []
    for step in _steps(folder):
        try:
            return _restore(folder / _FOLDER.format(step), method_state, base_fingerprint)
        except InputError as error:
            problems.append(str(error))
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=4)
    if problems:
        raise InputError(f"no checkpoint in {folder} can be used; the newest: {problems[0]}")
    return None


def _restore(folder: Path, method_state: Any, base_fingerprint: str) -> RunCheckpoint:
    try:
        run = json.loads((folder / "run.json").read_text())
        step, data_state, totals = int(run["step"]), dict(run["data"]), dict(run["totals"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'run.json'} is missing or damaged: {error}") from error
    delta = deltas.load(folder / "delta", base_fingerprint=base_fingerprint)
    wanted = _named_leaves(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), method_state))
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=alone()) as checkpointer:
            restored = checkpointer.restore((folder / "state").resolve(), wanted)
    except Exception as error:  # Orbax and TensorStore raise whatever the damaged part happens to trip over
        raise InputError(f"{folder / 'state'} is damaged or of another run: {_first_line(error)}") from error
    # Orbax's arrays are committed to a device, for which a step would compile anew; these are as `init` makes them.
    leaves = [jnp.array(np.asarray(restored[name])) for name in sorted(restored)]
    return RunCheckpoint(step, delta, jax.tree.unflatten(jax.tree.structure(method_state), leaves), data_state, totals)
