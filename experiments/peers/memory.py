"""Peak memory of one side, alone in a process: python -m experiments.peers.memory, with a request on its input."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.peers.setting import Arrays, Setting, use_cores

__all__ = ["Memory", "measure"]

STEPS = 2
"""Steps that are measured, after one that compiles and makes the optimizer's state."""


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that trains.

    Attributes:
        peak_bytes: the most while it trained; where the kernel cannot begin to count anew, while it loaded too.
        library_bytes: of the packages alone, before there was a model.
    """

    peak_bytes: int
    library_bytes: int


def measure(
    side: str, setting: Setting, folder: Path, batches: Sequence[Arrays], *, cores: int, scratch: Path
) -> Memory:
    """Trains a few steps in a new process and returns its memory.

    Args:
        side: "ours" or "theirs".
        setting: the method.
        folder: the model.
        batches: of which the first ones are trained on.
        cores: cores that the process may use.
        scratch: a folder for the batches.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    file = scratch / "batches.npz"
    arrays: dict[str, Any] = {
        f"{name}.{number}": batch[name] for number, batch in enumerate(batches[: STEPS + 1]) for name in batch
    }
    np.savez(file, **arrays)
    request = {"side": side, "setting": dataclasses.asdict(setting), "folder": str(folder), "batches": str(file)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.peers.memory"],
        input=json.dumps(request | {"cores": cores}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed: {' '.join(done.stderr.split())[-500:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _serve(request: dict[str, Any]) -> Memory:
    """Does what a request asks, in this process."""
    use_cores(request["cores"])
    setting, folder = Setting(**request["setting"]), Path(request["folder"])
    with np.load(request["batches"]) as held:
        count = 1 + max(int(name.rpartition(".")[2]) for name in held.files)
        batches = [
            {name.rpartition(".")[0]: held[name] for name in held.files if name.endswith(f".{number}")}
            for number in range(count)
        ]
    side: Any
    if request["side"] == "ours":
        import jax

        from experiments.peers.ours import Ours

        jax.config.update("jax_platforms", "cpu")
        jax.devices()
        library_bytes = resident("VmRSS")
        side = Ours(setting, folder, keep_base=False)
    else:
        from experiments.peers.theirs import Theirs

        library_bytes = resident("VmRSS")
        side = Theirs(setting, folder)
    side.step(batches[0])
    _forget_peak()
    for batch in batches[1:]:
        side.step(batch)
    return Memory(resident("VmHWM"), library_bytes)


def resident(field: str) -> int:
    """Returns a field of /proc/self/status in bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _forget_peak() -> None:
    """Lets VmHWM begin anew, where the kernel can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_serve(json.load(sys.stdin)))))
