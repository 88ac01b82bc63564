"""What both sides are given, and what is asked of them; needs neither JAX nor torch."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

__all__ = ["PARTNERS", "Arrays", "Setting", "Side", "Start", "same_method", "size_on_disk", "use_cores"]

Arrays = Mapping[str, np.ndarray]
"""A batch: `tokens`, `targets`, `weights` and `segments`, each (rows, length), see `jaxsparse.data.batches.Batch`."""

Start = Mapping[str, Mapping[str, np.ndarray]]
"""What a method starts from, by Hugging Face's name of a module: `a` (in, r) of low-rank methods, or `index` (k,), flat
places in the (out, in) weight, of sparse ones."""

PARTNERS = {
    "lora": "lora",
    "dora": "dora",
    "shira": "shira",
    "super_tuning": "super_tuning",
    "full": "full",
    "gasdu": "lora",
}
"""PEFT's method that each of ours runs in turn with; GASDU, which PEFT does not have, with LoRA."""


@dataclass(frozen=True)
class Setting:
    """A method with its numbers; what it does not have is ignored.

    Attributes:
        method: a key of `PARTNERS`.
        lr: learning rate of AdamW, constant; without weight decay and clipping.
        rank: r of LoRA and DoRA, and of SHiRA, which trains r (in + out) entries of a matrix.
        alpha: of LoRA's and DoRA's alpha / r.
        density: entries that train / size of a matrix, of Super-Tuning and GASDU.
        refresh_every: steps between GASDU's refreshes.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
    """

    method: str
    lr: float
    rank: int = 8
    alpha: float = 16.0
    density: float = 0.01
    refresh_every: int = 50
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class Side(Protocol):
    """A model in training, of one of the two packages."""

    def step(self, batch: Arrays) -> float:
        """Trains one step, waits for its end, and returns the loss before it."""

    def state_bytes(self) -> int:
        """Returns the bytes held beside the model's weights: what trains, where it goes, moments."""

    def save(self, folder: Path) -> int:
        """Saves what fine-tuning made, as the package does, and returns its bytes on disk."""


def same_method(method: str) -> bool:
    """Whether both sides run the same method, so that their losses must agree."""
    return PARTNERS[method] == method


def use_cores(count: int) -> None:
    """Keeps this process and all its threads on so many cores; before JAX or torch is imported.

    Torch's threads are also told to sleep while they wait for one another, unless OMP_WAIT_POLICY says otherwise: by
    default they spin, and where another job has a core of theirs, every small operation then waits for the scheduler,
    which made steps of a tiny model 200 times as slow.

    Args:
        count: number of cores; fewer if there are fewer.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def size_on_disk(files: Iterable[Path]) -> int:
    """Returns the bytes of all files among paths."""
    return sum(file.stat().st_size for file in files if file.is_file())
