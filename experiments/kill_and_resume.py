"""A run that is killed again and again ends with the bits of one that was not."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.tiny import make_tiny_model
from jaxsparse import deltas
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import progress
from jaxsparse.data.arithmetic import generate_problems
from jaxsparse.deltas import Delta
from jaxsparse.plan.absent import use_cpu

_START_SECONDS = 8.0
"""A start takes about so long until the first step."""
_PASSED_OVER = "checkpoint passed over"


@dataclass(frozen=True)
class KillConfig:
    """Fine-tunes a tiny model once in peace, and once killed by SIGKILL at random moments and resumed.

    After every kill it checks that no checkpoint that lay there is lost, and by the next start that the newest could be
    read; at the end that both deltas are the same bit for bit.

    Example: python -m experiments.kill_and_resume --kills 20
    """

    kills: int = 20
    """How often to kill."""
    during_saves: float = 0.5
    """The share of kills that wait for a checkpoint to be being written."""
    early: int = 3
    """So many of the first kills come at any moment from the start on, before anything is saved too."""
    steps: int = 400
    """Optimizer steps of the run."""
    every: int = 5
    """Steps between checkpoints."""
    method: str = "gasdu"
    """The method."""
    seed: int = 0
    """Of the moments."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


@dataclass
class Outcome:
    """What happened.

    Attributes:
        kills: how often the run was killed.
        during_saves: of these while a checkpoint was being written.
        early: of these before the run that was killed had saved anything.
        lost: checkpoints that were there and then were not, nor a newer one.
        torn: checkpoints that a start found damaged and passed over.
        steps: of the newest checkpoint at every kill; -1 where there was none.
        same_bits: whether the delta is that of the run in peace.
    """

    kills: int = 0
    during_saves: int = 0
    early: int = 0
    lost: int = 0
    torn: int = 0
    steps: list[int] = field(default_factory=list)
    same_bits: bool = False


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Makes a tiny model of random weights, and problems to train on."""
    model = make_tiny_model(folder / "model")
    rows = [dataclasses.asdict(row) for row in generate_problems(64, split="train", seed=1)]
    (folder / "train.json").write_text(json.dumps(rows))
    return model, folder / "train.json"


def command(config: KillConfig, model: Path, data: Path, out: Path) -> list[str]:
    """Returns the command of the run."""
    options = {"model": model, "data": data, "out": out, "method": config.method, "steps": config.steps}
    options |= {"checkpoint-every": config.every, "lr": 0.01, "batch": 4, "max-length": 96, "template": "plain"}
    options |= {"density": 0.02, "refresh-every": 5} if config.method == "gasdu" else {}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "jaxsparse.cli.main", "finetune", *flags, "--resume"]


def whole(checkpoints: Path) -> list[str]:
    """Returns the names of the checkpoints that are there."""
    return sorted(entry.name for entry in checkpoints.glob("step_*")) if checkpoints.is_dir() else []


def kill_once(config: KillConfig, arguments: list[str], out: Path, rng: random.Random, outcome: Outcome) -> bool:
    """Starts the run and kills it at a random moment; returns whether it had ended before."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache")}
    before, checkpoints, start = whole(out / "checkpoints"), out / "checkpoints", time.monotonic()
    with (out.parent / "said").open("w+") as said:
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        at_any_time, wants_save = outcome.kills < config.early, rng.random() < config.during_saves
        saves, pause, delay = rng.randint(1, 4), rng.uniform(0, 0.4), rng.uniform(0, _START_SECONDS)
        # But for those, not before it has done something: a start alone takes seconds.
        while process.poll() is None and whole(checkpoints) == before:
            if at_any_time and time.monotonic() - start > delay:
                break
            time.sleep(0.002)
        _wait(process, checkpoints, saves if wants_save and not at_any_time else 0, 0 if at_any_time else pause)
        there, writing = whole(checkpoints), any(checkpoints.glob(".step_*"))
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        said.seek(0)
        outcome.torn += _PASSED_OVER in said.read()
    if ended:
        return True
    left = whole(checkpoints)
    outcome.kills += 1
    outcome.during_saves += writing
    outcome.early += there == before
    outcome.steps.append(int(left[-1].removeprefix("step_")) if left else -1)
    outcome.lost += bool(there and (not left or left[-1] < there[-1]))
    return False


def _wait(process: subprocess.Popen[bytes], checkpoints: Path, saves: int, pause: float) -> None:
    """Until so many checkpoints have been begun; where none is waited for, a moment."""
    if saves:
        seen = 0
        while process.poll() is None and seen < saves:
            writing = any(checkpoints.glob(".step_*"))
            seen += writing
            while seen < saves and writing and process.poll() is None and any(checkpoints.glob(".step_*")):
                time.sleep(0.0005)
    else:
        time.sleep(pause)


def run(config: KillConfig, folder: Path) -> Outcome:
    """Does it all in a folder."""
    model, data = make_inputs(folder)
    peace, war = folder / "peace", folder / "war"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    rng, outcome = random.Random(config.seed), Outcome()
    quiet = subprocess.DEVNULL
    with progress("killing", config.kills + 2) as advance:
        subprocess.run(command(config, model, data, peace), env=environment, stdout=quiet, stderr=quiet, check=True)
        advance(1, "the run in peace")
        while outcome.kills < config.kills:
            if kill_once(config, command(config, model, data, war), war, rng, outcome):
                raise InputError(f"the run ended after {outcome.kills} kills; give more --steps")
            advance(1, f"{whole(war / 'checkpoints')[-1:]}")
        last = command(config, model, data, war)
        said = subprocess.run(last, env=environment, stdout=quiet, stderr=subprocess.PIPE, text=True, check=True).stderr
        outcome.torn += _PASSED_OVER in said
        advance(1, "resumed to the end")
    outcome.same_bits = same(deltas.load(peace / "delta"), deltas.load(war / "delta"))
    return outcome


def same(one: Delta, other: Delta) -> bool:
    """Whether two deltas change the same weights to the same bits."""
    return one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(ours.indices, other.tensors[path].indices) and np.array_equal(ours.xor, other.tensors[path].xor)  # type: ignore[attr-defined]
        for path, ours in one.tensors.items()
    )


def main(arguments: Sequence[str]) -> int:
    """Runs it and prints the count; 1 where something was lost or differs."""
    use_cpu()
    config = parse(lambda given: KillConfig, "python -m experiments.kill_and_resume", arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(config, Path(folder))
    said: dict[str, Any] = dataclasses.asdict(outcome)
    if config.json:
        print(json.dumps(said))
    else:
        steps = ", ".join(map(str, outcome.steps))
        print(
            f"killed {outcome.kills} times, {outcome.during_saves} of them while a checkpoint was being written and "
            f"{outcome.early} before anything was saved, the newest checkpoints being of steps {steps}; "
            f"{outcome.lost} checkpoints lost, {outcome.torn} damaged; "
            f"{'the same bits' if outcome.same_bits else 'OTHER BITS'} at the end"
        )
    return 0 if outcome.same_bits and not outcome.lost and not outcome.torn else 1


if __name__ == "__main__":
    raise SystemExit(reported("experiments.kill_and_resume", lambda: main(sys.argv[1:])))
