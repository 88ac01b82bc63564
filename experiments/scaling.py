"""Cost against size: peak memory of a device and time of a step, from 1B to 70B weights, on 1 to 256 chips."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxsparse as js
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import check_writable
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch
from jaxsparse.engine.sharding import row_parts
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.plan.absent import device_count, use_cpu
from jaxsparse.plan.steps import absent_sharding, plan_step
from jaxsparse.subspaces.targets import tree_size


@dataclass(frozen=True)
class ScalingConfig:
    """Plans steps of several models on several numbers of devices, GASDU beside full fine-tuning, and draws them.

    Every plan takes a minute or some; a file keeps them, and what is in it is not planned again.

    Example: python -m experiments.scaling --models tinyllama-1.1b llama2-7b --devices v5p v5p-16
    """

    models: tuple[str, ...] = ("tinyllama-1.1b", "llama2-7b", "llama2-13b", "llama2-70b")
    """Known names."""
    devices: tuple[str, ...] = ("v5p", "v5p-4", "v5p-16", "v5p-64", "v5p-256")
    """As `jaxsparse plan` takes them; all weights and rows are divided along fsdp."""
    methods: tuple[str, ...] = ("full", "gasdu")
    """Methods, GASDU with budget 1e-4 shared evenly."""
    rows: int = 1
    """Rows of a batch for each device."""
    length: int = 768
    """Tokens of a row."""
    out: Path = Path("runs/scaling")
    """Folder for plans.jsonl and scaling.png."""


_METHODS = {
    "gasdu": lambda: js.gasdu(optax.adam(1e-4), budget=1e-4, share="even"),
    "full": lambda: js.full(optax.adam(1e-4)),
    "lora": lambda: js.lora(optax.adam(1e-4), rank=8),
}


# To be raised when what a plan counts changes: plans of before are then made anew.
_COSTS = 2


def planned(config: ScalingConfig, name: str, device: str, method: str) -> dict[str, Any]:
    """Returns one plan as JSON can hold it."""
    sharding = absent_sharding(device, None)
    model = LanguageModel(load_config(name), "full", row_parts=row_parts(sharding))
    params = model.abstract(jnp.bfloat16)
    _, count = device_count(device)
    shape = count * config.rows, config.length
    whole: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    number: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    tuner = js.fuse(model.loss, _METHODS[method](), has_aux=True, sharding=sharding if method != "lora" else None)
    plan = plan_step(tuner, params, Batch(whole, whole, number, whole, whole), device, sharding=sharding)
    return {"weights_of_model": tree_size(params), "devices": count, **dataclasses.asdict(plan)}


def key_of(config: ScalingConfig, name: str, device: str, method: str) -> dict[str, Any]:
    """Returns what tells a plan from others."""
    versions = {"jax": jax.__version__, "jaxsparse": version("jaxsparse"), "costs": _COSTS}
    return {
        "model": name, "device": device, "method": method, "rows": config.rows, "length": config.length, **versions
    }  # fmt: skip


def plans(config: ScalingConfig) -> list[dict[str, Any]]:
    """Plans all that the file does not hold yet, and returns all of this configuration."""
    file = config.out / "plans.jsonl"
    known = list(_read(file))
    wanted = [(n, d, m) for n in config.models for d in config.devices for m in config.methods]
    found = []
    with progress("planning", len(wanted)) as advance:
        for name, device, method in wanted:
            key = key_of(config, name, device, method)
            row = next((row for row in known if key.items() <= row.items()), None)
            if row is None:
                try:
                    row = key | planned(config, name, device, method)
                except InputError as error:
                    row = key | {"problem": str(error)}  # not kept: a compiler may be installed by the next call
            if "problem" not in row and row not in known:
                _append(file, row)
            found.append(row)
            advance(1, f"{method} {name} {device}")
    return found


def _append(file: Path, row: dict[str, Any]) -> None:
    """Adds a line, on its own also where a call that was killed left half of one."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(("" if before.endswith("\n") or not before else "\n") + json.dumps(row) + "\n")


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the file: a call that was killed may have left half of one."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draws peak memory and time of a step against the number of devices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for panel, name, what, unit in ((left, "peak", "peak memory of each, GB", 1e-9), (right, "seconds", "ms", 1e3)):
        for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            for method in dict.fromkeys(row["method"] for row in rows):
                own = [row for row in rows if (row["model"], row["method"]) == (model, method) and name in row]
                numbers, values = [row["devices"] for row in own], [unit * row[name] for row in own]
                line = "-" if method == "gasdu" else "--"
                panel.plot(numbers, values, line, color=f"C{number}", marker="o", label=f"{model}, {method}")
        panel.set(xscale="log", yscale="log", xlabel="devices; the batch grows with them", ylabel=what)
        counts = sorted({row["devices"] for row in rows if "devices" in row})
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="y", which="minor", labelsize=6)
        panel.grid(visible=True, alpha=0.3)
    right.set_ylabel("time of a step at least, ms")
    memory = next((row["memory"] for row in rows if "memory" in row), None)
    if memory:
        left.axhline(memory / 1e9, color="black", linewidth=0.8, label="memory of a device")
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=3, handlelength=5)
    figure.savefig(file)


def main(arguments: Sequence[str]) -> int:
    """Plans, and draws."""
    use_cpu()
    config = parse(lambda given: ScalingConfig, "python -m experiments.scaling", arguments)
    for method in config.methods:
        if method not in _METHODS:
            raise InputError(f"unknown method {method!r}; known: {', '.join(_METHODS)}")
    for device in config.devices:
        device_count(device)
    for name in ("rows", "length"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    check_writable(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    rows = plans(config)
    draw(rows, config.out / "scaling.png")
    for row in rows:
        name = f"{row['model']:16} {row['device']:8} {row['method']:6}"
        said = row.get("problem") or f"peak {row['peak'] / 1e9:8.2f} GB each   step {1e3 * row['seconds']:8.1f} ms"
        print(name, said)
    return 0


if __name__ == "__main__":
    raise SystemExit(reported("experiments.scaling", lambda: main(sys.argv[1:])))
