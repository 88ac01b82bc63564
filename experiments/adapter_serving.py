"""Switching between adapters of one layer, and serving many at once: S²FT's figure 6, by what this package does.

Switching: from one adapter to another on a square layer; slices of S²FT, or single entries, against a LoRA that is
taken off and put on by two products and two sums. `live` is `js.deltas.live`, whose deltas lie beside the model;
`checked` is `js.deltas.switch`, which brings the entries to the host and compares their checksums before it writes.
Serving: a batch whose rows have adapters of their own, beside one product with the base.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.table import Table

import jaxsparse as js
from experiments.tables import show
from experiments.timing import in_turns
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.errors import reported
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.fingerprints import tensor_checksum
from jaxsparse.common.progress import progress
from jaxsparse.deltas import CoordinateDelta, Delta, FactorDelta, Metadata, SliceDelta
from jaxsparse.plan.absent import use_cpu
from jaxsparse.subspaces.targets import matrix_view


@dataclass(frozen=True)
class AdapterServingConfig:
    """Times switching between two adapters, and serving many at once, on a single layer.

    Example: python -m experiments.adapter_serving --sizes 4096 8192 --rounds 9
    """

    parts: tuple[Literal["switch", "serve"], ...] = ("switch", "serve")
    """What to time."""
    sizes: tuple[int, ...] = (4096, 8192, 12288, 16384)
    """Inputs and outputs of the layer to switch on (S²FT, figure 6)."""
    adapters: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Numbers of adapters in a batch to serve."""
    width: int = 4096
    """Inputs and outputs of the layer to serve."""
    rows: int = 256
    """Rows of a batch to serve, one token each."""
    slices: int = 32
    """Input slices of an adapter of S²FT (figure 6)."""
    rank: int = 16
    """Rank of LoRA (figure 6)."""
    density: float = 1e-4
    """Entries of an adapter of coordinates / all."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the layer."""
    rounds: int = 9
    """How often each route is timed, in turns."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where."""
    json: Path | None = None
    """Where to write the rows as JSON."""


@dataclass(frozen=True)
class Row:
    """What one route took.

    Attributes:
        part: "switch" or "serve".
        size: the layer's inputs and outputs.
        adapters: in the batch; 2 for a switch.
        route: which.
        median_s: of its times.
        spread_s: half the distance between their quartiles.
        to_lora: its median over LoRA's.
    """

    part: str
    size: int
    adapters: int
    route: str
    median_s: float
    spread_s: float
    to_lora: float


# ---- adapters of a layer ---------------------------------------------------------------------------------------


def layer(size: int, dtype: str, seed: int = 0) -> Array:
    """Returns a random layer, (in, out)."""
    return 0.02 * jax.random.normal(jax.random.key(seed), (size, size), jnp.dtype(dtype))


def _moved(rng: np.random.Generator, old: np.ndarray) -> tuple[np.ndarray, str, str]:
    """Exclusive-or bits of weights that took a random step, and both checksums."""
    new = (old.astype(np.float32) + 1e-3 * rng.normal(size=old.shape)).astype(old.dtype)
    bits = f"uint{8 * old.itemsize}"
    before, after = old.view(bits), new.view(bits)
    after = np.where(before == after, before ^ 1, after)
    return before ^ after, tensor_checksum(before), tensor_checksum(after)


def slices_delta(weight: np.ndarray, slices: int, seed: int) -> Delta:
    """Returns a delta of random input slices."""
    rng, size = np.random.default_rng(seed), weight.shape[0]
    rows = np.sort(rng.choice(size, slices, replace=False)).astype(np.int32)[None]
    xor, before, after = _moved(rng, weight[rows])
    view = matrix_view(weight.shape, (), (0,), (1,))
    tensor = SliceDelta(weight.shape, weight.dtype.name, before, after, view, "input", rows, xor)
    return Delta({"kernel": tensor}, Metadata(method="s2ft"))


def entries_delta(weight: np.ndarray, density: float, seed: int) -> Delta:
    """Returns a delta of random entries."""
    rng = np.random.default_rng(seed)
    places = np.unique(rng.integers(0, weight.size, max(1, round(density * weight.size)))).astype(np.int32)
    xor, before, after = _moved(rng, weight.reshape(-1)[places])
    tensor = CoordinateDelta(weight.shape, weight.dtype.name, before, after, places, xor)
    return Delta({"kernel": tensor}, Metadata(method="gasdu"))


def factors(size: int, rank: int, dtype: str, adapters: int) -> tuple[Array, Array]:
    """Returns random A (adapters, in, r) and B (adapters, r, out)."""
    keys = jax.random.split(jax.random.key(1), 2)
    shapes = (adapters, size, rank), (adapters, rank, size)
    a, b = (0.02 * jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))
    return a, b


# ---- switching -------------------------------------------------------------------------------------------------


@partial(jax.jit, donate_argnums=0)
def lora_switch(weight: Array, off: tuple[Array, Array], on: tuple[Array, Array]) -> Array:
    """Takes one product off a layer and puts another on, as LoRA's switch does: two products, two sums."""
    return (weight - off[0] @ off[1]) + on[0] @ on[1]


@partial(jax.jit, donate_argnums=0)
def scatter_switch(weight: Array, off: tuple[Array, Array], on: tuple[Array, Array]) -> Array:
    """Takes slices off a layer and puts others on by two sums at indices, as S²FT's switch does (section 5.4)."""
    weight = weight.at[off[0]].add(-off[1], unique_indices=True, indices_are_sorted=True)
    return weight.at[on[0]].add(on[1], unique_indices=True, indices_are_sorted=True)


class Turning:
    """A route that switches to and fro; every call turns once."""

    def __init__(self, state: Any, turn: Callable[[Any, int], Any]) -> None:
        self.state, self.turn, self.at = state, turn, 0

    def __call__(self) -> Any:
        """Switches, and returns what is to be waited for."""
        self.at = 1 - self.at
        self.state = self.turn(self.state, self.at)
        return self.state.params if isinstance(self.state, js.deltas.Live) else self.state


def switch_routes(size: int, config: AdapterServingConfig) -> dict[str, Turning]:
    """Returns all ways to switch, each with a layer of its own."""
    weight = layer(size, config.dtype)
    host = np.array(weight)
    pairs = {
        f"{config.slices} slices": [slices_delta(host, config.slices, seed) for seed in (1, 2)],
        f"entries, density {config.density:g}": [entries_delta(host, config.density, seed) for seed in (1, 2)],
    }
    a, b = factors(size, config.rank, config.dtype, 2)
    lora = [(a[at], b[at]) for at in range(2)]
    routes = {f"LoRA r={config.rank}, unmerge and merge": Turning(weight, _lora_turn(lora))}
    sliced = [(jnp.asarray(d.tensors["kernel"].slices[0]), _values(d, host)) for d in pairs[f"{config.slices} slices"]]
    routes[f"{config.slices} slices, two scatter-adds"] = Turning(jnp.asarray(host), _scatter_turn(sliced))
    for name, pair in pairs.items():
        model = js.deltas.live({"kernel": jnp.asarray(host)}, dict(zip("ab", pair, strict=True)), donate=True)
        routes[f"{name}, live"] = Turning(model.switch("a"), lambda model, at: model.switch("ab"[at]))
        tuned = js.deltas.apply({"kernel": jnp.asarray(host)}, pair[0], donate=True)
        routes[f"{name}, checked"] = Turning(tuned, _checked_turn(pair))
    return routes


def _values(delta: Delta, host: np.ndarray) -> Array:
    tensor = delta.tensors["kernel"]
    return jnp.asarray(js.deltas.entry_changes("kernel", tensor, host)[0]).astype(host.dtype)


def _lora_turn(pair: list[tuple[Array, Array]]) -> Callable[[Any, int], Any]:
    return lambda weight, at: lora_switch(weight, pair[1 - at], pair[at])


def _scatter_turn(pair: list[tuple[Array, Array]]) -> Callable[[Any, int], Any]:
    return lambda weight, at: scatter_switch(weight, pair[1 - at], pair[at])


def _checked_turn(pair: list[Delta]) -> Callable[[Any, int], Any]:
    return lambda params, at: js.deltas.switch(params, pair[1 - at], pair[at], donate=True)


def switching(config: AdapterServingConfig) -> list[Row]:
    """Times all ways to switch on layers of all sizes."""
    rows = []
    with progress("switching", len(config.sizes)) as advance:
        for size in config.sizes:
            routes = switch_routes(size, config)
            # Each turns to and fro: an even number of calls is as many of either.
            times = in_turns(routes, config.rounds, calls=2 if config.device == "cpu" else 16, warm_up=2)
            rows += _rows("switch", size, 2, times)
            del routes
            advance(1, f"{size} x {size}")
    return rows


def _rows(part: str, size: int, adapters: int, times: dict[str, tuple[float, float]]) -> list[Row]:
    lora = next(median for name, (median, _) in times.items() if name.startswith("LoRA"))
    return [Row(part, size, adapters, name, median, spread, median / lora) for name, (median, spread) in times.items()]


# ---- serving many ----------------------------------------------------------------------------------------------


def lora_rows(weight: Array, x: Array, adapters: Array, a: Array, b: Array) -> Array:
    """Batched LoRA by hand: every row's factors are gathered, and multiplied one after the other."""
    return x @ weight + jnp.einsum("nr,nro->no", jnp.einsum("ni,nir->nr", x, a[adapters]), b[adapters])


def serve_routes(config: AdapterServingConfig, adapters: int) -> dict[str, Callable[[], Any]]:
    """Returns the product of a batch with a layer alone, and with adapters beside it."""
    weight = layer(config.width, config.dtype)
    host = np.array(weight)
    x = jax.random.normal(jax.random.key(2), (config.rows, config.width), jnp.dtype(config.dtype))
    rows = jnp.asarray(np.random.default_rng(3).permutation(config.rows) % adapters, jnp.int32)
    a, b = factors(config.width, config.rank, config.dtype, adapters)
    alone, by_hand = jax.jit(lambda weight, x: x @ weight), jax.jit(lora_rows)
    routes = {
        f"LoRA r={config.rank}, by hand": partial(by_hand, weight, x, rows, a, b),
        "the base alone": partial(alone, weight, x),
    }
    served = jax.jit(js.serve(lambda params, x: x @ params["kernel"]))
    base = {"kernel": weight}
    made = {
        f"{config.slices} slices": [slices_delta(host, config.slices, seed) for seed in range(adapters)],
        f"entries, density {config.density:g}": [entries_delta(host, config.density, seed) for seed in range(adapters)],
        f"LoRA r={config.rank}": [_factor_delta(host, a[seed], b[seed]) for seed in range(adapters)],
    }
    for name, each in made.items():
        stacked = js.deltas.stack(each, base=base, dtype=config.dtype)
        routes[f"{name}, js.serve"] = partial(served, base, stacked, rows, x)
    return routes


def _factor_delta(host: np.ndarray, a: Array, b: Array) -> Delta:
    view, checksum = matrix_view(host.shape, (), (0,), (1,)), tensor_checksum(host)
    parts = (np.array(factor, np.float32)[None] for factor in (a, b))
    # Nobody reverts it: what the tuned tensor's checksum would be does not matter here.
    return Delta(
        {"kernel": FactorDelta(host.shape, host.dtype.name, checksum, "0" * 64, view, *parts, 1.0)}, Metadata()
    )


def serving(config: AdapterServingConfig) -> list[Row]:
    """Times a batch's product with a layer, alone and with every kind of adapter beside it."""
    rows = []
    with progress("serving", len(config.adapters)) as advance:
        for adapters in config.adapters:
            times = in_turns(serve_routes(config, adapters), config.rounds, calls=4 if config.device == "cpu" else 16)
            rows += _rows("serve", config.width, adapters, times)
            advance(1, f"{adapters} adapters")
    return rows


def main(arguments: Sequence[str]) -> int:
    """Measures, prints the tables, and writes the rows."""
    config = parse(lambda given: AdapterServingConfig, "python -m experiments.adapter_serving", arguments)
    if config.slices > min((*config.sizes, config.width)):
        raise InputError(f"slices={config.slices} are more than a layer of {min((*config.sizes, config.width))} has")
    if config.device == "cpu":
        use_cpu()
    rows = [row for part in config.parts for row in (switching if part == "switch" else serving)(config)]
    for part in config.parts:
        show(_table(part, [row for row in rows if row.part == part]))
    if config.json is not None:
        atomic_write_text(config.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _table(part: str, rows: Sequence[Row]) -> Table:
    table = Table("layer", "adapters", part, "ms", "/ LoRA")
    for row in rows:
        times = f"{1e3 * row.median_s:.3g} ± {1e3 * row.spread_s:.1g}"
        table.add_row(f"{row.size} x {row.size}", str(row.adapters), row.route, times, f"{row.to_lora:.3g}")
    return table


if __name__ == "__main__":
    raise SystemExit(reported("experiments.adapter_serving", lambda: main(sys.argv[1:])))
