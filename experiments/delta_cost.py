"""What deltas cost: bytes of an entry on disk, and the time to load and apply one beside that to load its base.

Sizes are of deltas that exist (`--deltas`), and of entries drawn at random from matrices of LLaMA-2-7B's size whose
weights of deviation 0.02 moved by steps of several sizes. Times are those of a random model.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.table import Table

from experiments.tables import show
from experiments.timing import in_turns
from jaxsparse import deltas
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.fingerprints import tensor_checksum
from jaxsparse.common.progress import progress
from jaxsparse.models import checkpoints
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel

MOVES = (1e-4, 1e-3, 5e-3)
SHAPES = {f"layers/self_attn/{name}_proj/kernel": (4, 4096, 4096) for name in "qkvo"}


@dataclass(frozen=True)
class DeltaCostConfig:
    """Measures deltas' sizes and the time to load and apply one.

    Example: python -m experiments.delta_cost --deltas runs/first/delta --model tinyllama-1.1b
    """

    deltas: tuple[Path, ...] = ()
    """Saved deltas to measure."""
    density: float = 1e-3
    """Entries / size of the random ones."""
    model: str = "tinyllama-1.1b"
    """A known name or config.json: shapes of the model to load."""
    entries: int = 8_000_000
    """Entries of the delta to load and apply."""
    rounds: int = 5
    """How often loading is timed; 0 leaves it out."""
    scratch: Path | None = None
    """Where to write the model (2 GB for 1B parameters in bfloat16); the system's temporary folder by default."""
    json: Path | None = None
    """Where to write the numbers as JSON."""


@dataclass(frozen=True)
class Size:
    """A delta on disk.

    Attributes:
        name: which.
        entries: weights that it changes.
        folder_bytes: bytes of an entry in the form of a folder.
        file_bytes: bytes of an entry in the form of a single file.
    """

    name: str
    entries: int
    folder_bytes: float
    file_bytes: float


def size_of(name: str, delta: deltas.Delta) -> Size:
    """Saves a delta in both forms and measures them."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = []
        for form in ("delta", "delta.safetensors"):
            path = Path(folder) / form
            deltas.save(path, delta)
            sizes.append(sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file()))
    return Size(name, delta.entries, *(size / delta.entries for size in sizes))


def random_delta(shapes: dict[str, tuple[int, ...]], entries: int, move: float, seed: int = 0) -> deltas.Delta:
    """Returns a delta of bfloat16 weights of deviation 0.02 at random places, moved by steps of deviation `move`.

    Args:
        shapes: of the tensors, by path; each gets its share of the entries.
        entries: so many weights take a step; some of a small one stay as they are.
        move: deviation of the steps.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    tensors = {}
    for path, shape in shapes.items():
        size = int(np.prod(shape))
        indices = np.unique(rng.integers(0, size, round(entries * size / total))).astype(np.int32)
        weights = 0.02 * rng.normal(size=indices.size)
        old = weights.astype(ml_dtypes.bfloat16)
        new = (old.astype(np.float32) + move * rng.normal(size=indices.size)).astype(ml_dtypes.bfloat16)
        bits = old.view(np.uint16), new.view(np.uint16)
        stays = bits[0] == bits[1]
        old, new = (each[~stays] for each in bits)
        checksums = tensor_checksum(old), tensor_checksum(new)
        tensors[path] = deltas.CoordinateDelta(shape, "bfloat16", *checksums, indices[~stays], old ^ new)
    return deltas.Delta(tensors, deltas.Metadata(method="random"))


def sizes(config: DeltaCostConfig) -> list[Size]:
    """Measures all sizes."""
    found = []
    entries = round(config.density * sum(int(np.prod(shape)) for shape in SHAPES.values()))
    with progress("measuring sizes", len(config.deltas) + len(MOVES)) as advance:
        for path in config.deltas:
            found.append(size_of(str(path), deltas.load(path)))
            advance(1, str(path))
        for move in MOVES:
            found.append(size_of(f"random, moves of {move:g}", random_delta(SHAPES, entries, move)))
            advance(1, "random")
    return found


def loading(config: DeltaCostConfig) -> dict[str, tuple[float, float]]:
    """Returns the time to load a model, and to load and apply a delta of it; medians and spreads."""
    model = LanguageModel(load_config(config.model))
    with tempfile.TemporaryDirectory(dir=config.scratch) as scratch, progress("timing", config.rounds + 3) as advance:
        folder, path = Path(scratch) / "model", Path(scratch) / "delta"
        params = model.init(jax.random.key(0), jnp.bfloat16)
        checkpoint = checkpoints.save(folder, model.config, params, None, config.model)
        advance(1, "writing the model")
        tuned = _moved(params, config.entries)
        delta = deltas.diff(params, tuned, base_fingerprint=checkpoint.fingerprint)
        del params, tuned
        deltas.save(path, delta)
        advance(1, f"writing a delta of {delta.entries:,} entries")
        held: list[Any] = [None]

        def load_model() -> Any:
            held[0] = None
            held[0] = checkpoints.load(folder).params
            return held[0]

        def load_and_apply() -> Any:
            loaded = deltas.load(path, base_fingerprint=checkpoint.fingerprint)
            held[0] = deltas.apply(held[0], loaded, donate=True, base_fingerprint=checkpoint.fingerprint)
            advance(1, "loading")
            return held[0]

        return in_turns({"load model": load_model, "load and apply delta": load_and_apply}, config.rounds)


def _moved(params: Any, entries: int) -> Any:
    """A model in which so many weights of its matrices took a step, each matrix its share."""
    rng = np.random.default_rng(0)
    kernels = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3]
    total = sum(leaf.size for leaf in kernels)

    def move(leaf: jax.Array) -> jax.Array:
        if leaf.ndim != 3:
            return leaf
        values = np.array(leaf)
        places = rng.integers(0, leaf.size, round(1.02 * entries * leaf.size / total))
        values.reshape(-1)[places] += (1e-3 * rng.normal(size=places.size)).astype(values.dtype)
        return jnp.asarray(values)

    return params | {"layers": jax.tree.map(move, params["layers"])}


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the tables, and writes the numbers."""
    config = parse(lambda given: DeltaCostConfig, "python -m experiments.delta_cost", arguments)
    found, times = sizes(config), loading(config) if config.rounds else {}
    table = Table("delta", "entries", "bytes / entry, folder", "bytes / entry, file")
    for size in found:
        table.add_row(size.name, f"{size.entries:,}", f"{size.folder_bytes:.2f}", f"{size.file_bytes:.2f}")
    show(table)
    if times:
        table = Table(config.model, "s", "share")
        whole = times["load model"][0]
        for name, (median, spread) in times.items():
            table.add_row(name, f"{median:.3f} ± {spread:.3f}", f"{median / whole:.1%}")
        show(table)
    if config.json is not None:
        written = {"sizes": [dataclasses.asdict(size) for size in found], "seconds": times}
        atomic_write_text(config.json, json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(reported("experiments.delta_cost", lambda: main(sys.argv[1:])))
