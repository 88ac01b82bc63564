"""Runs our methods beside Hugging Face's PEFT, and prints what each costs."""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments.peers.memory import Memory, measure
from experiments.peers.report import as_json, draw, table, write_csv
from experiments.peers.setting import PARTNERS, Arrays, Setting, use_cores
from experiments.tables import show
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text, check_writable
from jaxsparse.common.progress import progress
from jaxsparse.data.arithmetic import generate_problems
from jaxsparse.data.batches import batches
from jaxsparse.data.examples import encode_rows
from jaxsparse.data.prompts import TokenizerLike
from jaxsparse.data.rows import Row, load_rows
from jaxsparse.evaluate.suites import load_task
from jaxsparse.models import checkpoints
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.plan.absent import use_cpu

if TYPE_CHECKING:
    from experiments.peers.comparison import Comparison

Method = Literal["lora", "dora", "shira", "super_tuning", "full", "gasdu"]


@dataclass(frozen=True)
class PeersConfig:
    """Trains by the fused engine and by PEFT in torch, a step of one and a step of the other, on the same cores.

    Both have the same weights in float32, batches, learning rate and AdamW, and start from the same factors or mask, so
    that losses must agree: exits with 1 where they do not. GASDU, which PEFT does not have, runs beside PEFT's LoRA.
    Memory is that of a process for each side. GASDU's refreshes, one step in `refresh_every`, are not among the timed
    steps unless steps reach them: `experiments.step_cost` times them.

    Example: python -m experiments.peers --model smollm2-135m --steps 15 --batch 4 --max-length 128 --out runs/peers
    """

    model: str = "smollm2-135m"
    """A folder, a file, or a known name; of the LLaMA family."""
    data: Path | None = None
    """Rows to train on, JSON or JSONL."""
    data_root: Path | None = None
    """Train on a task that lies here instead; without either: generated arithmetic problems."""
    task: str = "numglue/type1"
    """The task under data_root."""
    methods: tuple[Method, ...] = ("lora", "dora", "shira", "super_tuning", "full", "gasdu")
    """What to compare."""
    steps: int = 15
    """Optimizer steps."""
    warm_up: int = 2
    """First steps that are not timed: compiling is among them."""
    batch: int = 4
    """Rows of a batch."""
    max_length: int = 128
    """Tokens of every row, padding included."""
    lr: float = 1e-3
    """Learning rate, constant."""
    full_lr: float = 2e-5
    """That of full fine-tuning, whose steps every weight takes."""
    rank: int = 8
    """r of LoRA, DoRA and SHiRA; alpha is 2 r."""
    density: float = 0.01
    """Entries that Super-Tuning and GASDU train / size of a matrix."""
    refresh_every: int = 50
    """Steps between GASDU's refreshes."""
    seed: int = 0
    """Of the order of the rows."""
    cores: int = 2
    """Cores, and threads of each side."""
    device: Literal["cpu"] = "cpu"
    """Where to train."""
    memory: bool = True
    """Measure memory too, which loads the model twice more for every method."""
    tolerance: float = 1e-3
    """How far losses of the same method may differ, in nats per token."""
    out: Path = Path("runs/peers")
    """Folder for peers.png, peers.csv and peers.json."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of the table."""

    def setting(self, method: str) -> Setting:
        """Returns the setting of a method."""
        lr = self.full_lr if method == "full" else self.lr
        return Setting(method, lr, self.rank, 2.0 * self.rank, self.density, self.refresh_every)


def make_batches(config: PeersConfig, tokenizer: TokenizerLike) -> list[Arrays]:
    """Returns a batch for every step, all of one shape."""
    examples = encode_rows(_rows(config), tokenizer, max_length=config.max_length, too_long="drop")
    buckets = (config.max_length,)
    found = batches(
        examples,
        batch_size=config.batch,
        max_length=config.max_length,
        seed=config.seed,
        drop_remainder=True,
        buckets=buckets,
    )
    return [batch._asdict() for batch in islice(found, config.steps)]


def _rows(config: PeersConfig) -> Sequence[Row]:
    if config.data is not None:
        return load_rows(config.data)
    if config.data_root is not None:
        return load_task(config.data_root, config.task).train
    return generate_problems(max(1000, config.batch), split="train", seed=config.seed)


def main(arguments: Sequence[str]) -> int:
    """Compares, prints the table, and writes the picture and the numbers."""
    config = parse(lambda given: PeersConfig, "python -m experiments.peers", arguments)
    _check(config)
    use_cores(config.cores)
    use_cpu()
    packages, load = _packages(), os.getloadavg()[0]
    config.out.mkdir(parents=True, exist_ok=True)
    comparisons, failures = _compare_all(config)
    for comparison in comparisons:
        if comparison.difference is not None and not comparison.difference <= config.tolerance:
            difference = f"losses differ by {comparison.difference:.1e}, more than {config.tolerance:g}"
            failures.append(f"{comparison.setting.method}: {difference}")
    tokens = config.batch * config.max_length
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    found = {"options": options, "packages": packages, "load_before": load, "failures": failures}
    found |= {"comparisons": as_json(comparisons, tokens, config.warm_up)}
    written = json.dumps(found, indent=1)
    atomic_write_text(config.out / "peers.json", written + "\n")
    if comparisons:
        write_csv(comparisons, config.out / "peers.csv")
        draw(comparisons, config.out / "peers.png")
    if config.json:
        print(written)
    elif comparisons:
        show(table(comparisons, tokens, config.warm_up))
        print(f"before this ran, {load:.1f} processes were busy on this machine's {os.cpu_count()} cores")
        print(f"curves: {config.out / 'peers.png'}, their data: {config.out / 'peers.csv'}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _compare_all(config: PeersConfig) -> "tuple[list[Comparison], list[str]]":
    """Compares one method after the other; one that fails does not cost the others."""
    from experiments.peers.comparison import compare  # torch may be missing

    comparisons: list[Comparison] = []
    failures: list[str] = []
    total = len(config.methods) * config.steps
    with tempfile.TemporaryDirectory() as folder, progress("comparing", total) as advance:
        scratch = Path(folder)
        model, data = _prepare(config, scratch / "model")

        def memory(side: str, setting: Setting) -> Memory:
            return measure(side, setting, model, data, cores=config.cores, scratch=scratch)

        for method in config.methods:
            setting, measured = config.setting(method), memory if config.memory else None
            try:
                found = compare(setting, model, data, scratch=scratch, memory=measured, advance=advance)
                comparisons.append(found)
            except Exception as error:
                failures.append(f"{method}: {type(error).__name__}: {error}")
    return comparisons, failures


def _prepare(config: PeersConfig, folder: Path) -> tuple[Path, list[Arrays]]:
    """Writes the model as both sides read it, in float32, and makes the batches."""
    base = checkpoints.load(config.model, dtype="float32")
    if not isinstance(base.config, LlamaConfig):
        raise InputError(
            f"model={config.model} is no LLaMA: PEFT's SHiRA and Super-Tuning know torch.nn.Linear only, which GPT-2 "
            "does not use; give one of the LLaMA family, such as smollm2-135m"
        )
    if base.tokenizer is None:
        raise InputError(f"model={config.model} has no tokenizer")
    longest = base.config.max_position_embeddings
    if config.max_length > longest:
        raise InputError(f"max_length={config.max_length} is more than the {longest} positions of the model")
    data = make_batches(config, base.tokenizer)
    checkpoints.export_hugging_face(folder, base)
    return folder, data


def _check(config: PeersConfig) -> None:
    for name in ("batch", "cores", "rank", "refresh_every"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.warm_up < config.steps:
        raise InputError(f"warm_up={config.warm_up} must leave a step to time: at least 0, below steps={config.steps}")
    if config.data is not None and config.data_root is not None:
        raise InputError(f"give data or data_root, not both: data={config.data}, data_root={config.data_root}")
    if not config.methods:
        raise InputError(f"methods is empty; there are {', '.join(PARTNERS)}")
    check_writable(config.out)


def _packages() -> dict[str, str]:
    """The versions of what is compared.

    Raises:
        InputError: the other side is not installed.
    """
    names = ("jax", "jaxsparse", "torch", "transformers", "peft")
    try:
        found = {name: version(name) for name in names}
    except PackageNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed, which ours is compared with: pip install jaxsparse[torch]"
        ) from error
    try:
        from peft import SupertuningConfig  # noqa: F401
    except ImportError:
        raise InputError(f"peft {found['peft']} has no Super-Tuning: it needs 0.21 or newer") from None
    return found


if __name__ == "__main__":
    raise SystemExit(reported("experiments.peers", lambda: main(sys.argv[1:])))
