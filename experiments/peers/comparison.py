"""Both sides step by step in turn, and what came of it."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.peers.memory import Memory
from experiments.peers.ours import Ours
from experiments.peers.setting import PARTNERS, Arrays, Setting, same_method
from experiments.peers.theirs import Theirs
from experiments.timing import median_and_spread

__all__ = ["Comparison", "Trained", "compare"]


@dataclass(frozen=True)
class Trained:
    """What one side did.

    Attributes:
        name: "jaxsparse gasdu", "PEFT lora" or "torch full".
        losses: before every step.
        seconds: of every step, the first ones included.
        state_bytes: held beside the weights.
        adapter_bytes: on disk.
        memory: of a process of its own, or None where it was not measured.
    """

    name: str
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    state_bytes: int
    adapter_bytes: int
    memory: Memory | None = None


@dataclass(frozen=True)
class Comparison:
    """A method of ours beside theirs.

    Attributes:
        setting: ours.
        ours: our side.
        theirs: their side.
    """

    setting: Setting
    ours: Trained
    theirs: Trained

    @property
    def difference(self) -> float | None:
        """The largest difference of two losses, where both sides run the same method."""
        if not same_method(self.setting.method):
            return None
        return float(np.max(np.abs(np.subtract(self.ours.losses, self.theirs.losses))))

    def ratio(self, warm_up: int) -> tuple[float, float]:
        """Returns median and spread of their seconds / our seconds, step by step: above 1 we are faster."""
        pairs = zip(self.theirs.seconds[warm_up:], self.ours.seconds[warm_up:], strict=True)
        return median_and_spread([theirs / ours for theirs, ours in pairs])


def compare(
    setting: Setting,
    folder: Path,
    batches: Sequence[Arrays],
    *,
    scratch: Path,
    memory: Callable[[str, Setting], Memory] | None = None,
    advance: Callable[..., None] = lambda *_: None,
) -> Comparison:
    """Trains both sides on the same batches, a step of one and a step of the other.

    Who goes first changes with every step: after another's step, caches hold nothing of one's own, and threads of the
    other may still wait for work.

    Args:
        setting: our method; theirs is its partner, from the same start if it is the same method.
        folder: the model, as Hugging Face lays it out.
        batches: one for every step.
        scratch: a folder for what is saved.
        memory: measures a side's memory; None: nobody does.
        advance: told of every step.
    """
    partner = Setting(**{**vars(setting), "method": PARTNERS[setting.method]})
    measured = {side: memory and memory(side, own) for side, own in (("ours", setting), ("theirs", partner))}
    ours = Ours(setting, folder)
    sides: dict[str, Any] = {
        "ours": ours,
        "theirs": Theirs(partner, folder, ours.start() if same_method(setting.method) else None),
    }
    losses: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number, batch in enumerate(batches):
        for side in sorted(sides, reverse=number % 2 == 1):
            start = time.perf_counter()
            losses[side].append(sides[side].step(batch))
            seconds[side].append(time.perf_counter() - start)
        advance(1, setting.method)
    other = "torch full" if partner.method == "full" else f"PEFT {partner.method}"
    trained = {
        side: Trained(
            *(name, tuple(losses[side]), tuple(seconds[side])),
            *(sides[side].state_bytes(), sides[side].save(scratch), measured[side]),
        )
        for side, name in (("ours", f"jaxsparse {setting.method}"), ("theirs", other))
    }
    for side in sides.values():
        side.close()
    gc.collect()
    return Comparison(setting, **trained)
