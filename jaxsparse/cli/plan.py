"""`jaxsparse plan`."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxsparse.cli.arguments import parse
from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch
from jaxsparse.engine.description import count_slots
from jaxsparse.engine.fused import fuse, is_divisible
from jaxsparse.engine.sharding import Selection, row_parts
from jaxsparse.methods.registry import constructor_of, options_class
from jaxsparse.models.checkpoints import load_config
from jaxsparse.models.functional import LanguageModel
from jaxsparse.plan.absent import device_count, use_cpu
from jaxsparse.plan.steps import StepPlan, absent_mesh, absent_sharding, plan_step
from jaxsparse.train.config import DataConfig, FinetuneConfig, ModelConfig, OptimizerConfig, Options, RunConfig
from jaxsparse.train.optimizer import make_method

__all__ = ["PlanConfig", "main"]

_WIDTH = 150
_MOST_TOKENS = 2**31 - 1  # an index of 32 bits reaches no further
_LACKS_MEMORY = "does not fit"
_REMATS: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")  # from the fastest to the smallest


@dataclass(frozen=True)
class PlanConfig(Generic[Options]):
    """Says what fine-tuning takes of a device that need not be here: memory, time at the least, size of the delta.

    The training step is really compiled for the device, by the compilers of `pip install jaxsparse[plan]` (GPUs) and
    `pip install libtpu` (TPUs); no weights are read. One step serves those that pick a support and those that do not.
    Peak memory is XLA's; weights and optimizer are their arrays; activations are what the forward pass keeps of all
    layers for the backward pass, counted from shapes; other is what is left of the peak: temporaries and the batch.

    Example: jaxsparse plan --model llama2-7b --method gasdu --density 1e-4 --batch 4 --max-length 768 --device h100
    """

    model: str
    """A known name (llama2-7b, llama3-8b, ...), a folder, or a config.json."""
    chosen_method: Options
    method: str = "gasdu"
    """The method; its own options are listed below."""
    device: str = "h100"
    """h100, v5e, v5p; or several as h100x8, v5e-16, v5p-64 (chips)."""
    mesh: str | None = None
    """How several devices divide the model, such as data=2,fsdp=4,tensor=2; None: all along fsdp."""
    selection: Selection = "per_shard"
    """Who picks entries by the gradient: every tensor shard its own part, or all together (global)."""
    batch: int = 4
    """Rows per optimizer step."""
    micro_batches: int = 1
    """Split every batch into so many parts, whose gradients are averaged: less memory, same step."""
    max_length: int = 768
    """Tokens of a row."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again instead of keeping it."""
    targets: str | None = None
    """Weights that may move, as `jaxsparse finetune` takes it."""
    compare: tuple[str, ...] = ("full", "lora")
    """Other methods to plan at their default options."""
    fit: Literal["batch", "max-length", "remat"] | None = None
    """Search what fits, and plan that: the largest batch that can be shared equally, the largest max-length (a multiple
    of 64), or the fastest remat."""
    inner: OptimizerConfig = field(default_factory=OptimizerConfig)
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class _Row:
    method: str
    plan: StepPlan | None
    delta_bytes: int | None
    problem: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments, compiles, and prints what was found; 1 where the method does not fit."""
    use_cpu()
    config = parse(lambda given: PlanConfig[options_class(given.get("method", "gasdu"))], "jaxsparse plan", arguments)  # type: ignore[misc]
    _check(config)
    if config.fit is not None:
        config = _fitted(config)
    names = [config.method, *(name for name in config.compare if name != config.method)]
    rows = []
    with progress(f"compiling for {config.device}", len(names)) as advance:
        for name in names:
            rows.append(_row(config, name))
            if name == config.method and rows[0].plan is None and _LACKS_MEMORY not in str(rows[0].problem):
                raise InputError(str(rows[0].problem))
            advance(1, name)
    (_print_json if config.json else _print)(config, rows)
    return 0 if rows[0].plan is not None and rows[0].plan.fits else 1


def _check(config: PlanConfig[Any]) -> None:
    """Whatever can be wrong before anything is compiled."""
    positions = load_config(config.model).max_position_embeddings
    for name in ("batch", "max_length", "micro_batches"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in config.compare:
        constructor_of(name)
    together = _rows_together(config)
    if config.fit != "max-length" and config.max_length > positions:
        raise InputError(f"max_length={config.max_length} is more than the {positions} positions of {config.model}")
    if config.fit != "batch" and config.batch % together:
        nearest = max(together, config.batch // together * together)
        raise InputError(
            f"batch={config.batch} cannot be shared equally: along data and fsdp, and in micro_batches="
            f"{config.micro_batches}, it must be a multiple of {together}, such as {nearest}"
        )
    if config.batch * config.max_length > _MOST_TOKENS:
        most, length = _MOST_TOKENS // config.max_length, config.max_length
        raise InputError(f"batch={config.batch} is too large to be planned at max_length={length}; at most {most}")


def _another(config: PlanConfig[Any], method: str) -> PlanConfig[Any]:
    options = options_class(method)
    return dataclasses.replace(config, method=method, chosen_method=options())


def _row(config: PlanConfig[Any], method: str) -> _Row:
    try:
        plan, delta_bytes = _plan(config if method == config.method else _another(config, method))
    except InputError as error:
        return _Row(method, None, None, str(error))
    return _Row(method, plan, delta_bytes)


def _plan(config: PlanConfig[Any]) -> tuple[StepPlan, int]:
    sharding = absent_sharding(config.device, config.mesh, config.selection)
    model = LanguageModel(load_config(config.model), config.remat, row_parts=row_parts(sharding))
    params = model.abstract(jnp.dtype(config.dtype))
    # Where to read rows and where to write is of no matter here.
    files = DataConfig(Path("-")), RunConfig(Path("-"))
    told = FinetuneConfig(
        ModelConfig(config.model), *files, config.chosen_method, config.inner, method=config.method,
        targets=config.targets,
    )  # fmt: skip
    method = make_method(told, params, 1000, model.config.head_dim)
    divided = sharding if is_divisible(method.description) else None
    tuner = fuse(model.loss, method, has_aux=True, accumulate=config.micro_batches, sharding=divided)
    shape = config.batch, config.max_length
    whole: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    number: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    plan = plan_step(tuner, params, Batch(whole, whole, number, whole, whole), config.device, sharding=sharding)
    return plan, round(_bytes_of_slot(config, method.description) * count_slots(method, params))


def _bytes_of_slot(config: PlanConfig[Any], description: Any) -> float:
    """Of the delta on disk: single entries take what experiments/delta_cost.py finds, others what they are."""
    width = jnp.dtype(config.dtype).itemsize
    kind = description.subspace_name
    if "low-rank" in kind or not is_divisible(description):
        return 4.0
    return width + 0.75 if kind in ("coordinates", "neurons") else float(width)


# ---- the largest that fits -------------------------------------------------------------------------------------


def _fitted(config: PlanConfig[Any]) -> PlanConfig[Any]:
    """The configuration with the largest batch or length, or the fastest remat, that fits."""
    if config.fit == "remat":
        for remat in _REMATS:
            tried = dataclasses.replace(config, remat=remat)
            if _fits(tried, f"remat={remat}"):
                return tried
        raise InputError(f"no remat fits in {config.device}; give a smaller --batch or --max-length, or more devices")
    name = "batch" if config.fit == "batch" else "max_length"
    longest = min(2**20, _MOST_TOKENS // config.max_length)
    if name == "max_length":
        longest = min(load_config(config.model).max_position_embeddings, _MOST_TOKENS // config.batch)
    step = min(64, longest) if name == "max_length" else _rows_together(config)

    def with_size(number: int) -> PlanConfig[Any]:
        size = number * step
        if name == "batch":
            return dataclasses.replace(config, batch=size)
        return dataclasses.replace(config, max_length=size)

    def fits(number: int) -> bool:
        return _fits(with_size(number), f"{name}={number * step}")

    largest = _largest(fits, longest // step)
    if not largest:
        raise InputError(f"not even {name}={step} fits in {config.device}; take more devices, or --remat full")
    return with_size(largest)


def _rows_together(config: PlanConfig[Any]) -> int:
    """How many rows a batch has at least, of which every other number is a multiple; the mesh is checked."""
    sizes = absent_mesh(config.device, config.mesh)
    return sizes["data"] * sizes["fsdp"] * config.micro_batches


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number that fits, exactly, by doubling and then by halves; 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(config: PlanConfig[Any], what: str) -> bool:
    try:
        plan, _ = _plan(config)
    except InputError as error:
        if _LACKS_MEMORY not in str(error):
            raise
        plan = None
    says = "does not fit" if plan is None or not plan.fits else "fits"
    Console(stderr=True).print(f"{what} {says}", highlight=False, markup=False)
    return plan is not None and plan.fits


# ---- what is said ----------------------------------------------------------------------------------------------


def _print_json(config: PlanConfig[Any], rows: Sequence[_Row]) -> None:
    names = ("model", "device", "mesh", "selection", "batch", "micro_batches", "max_length", "dtype", "remat")
    said = {name: getattr(config, name) for name in names}
    plans = [
        {"method": row.method, "problem": row.problem, "delta_bytes": row.delta_bytes}
        | ({} if row.plan is None else dataclasses.asdict(row.plan) | {"fits": row.plan.fits})
        for row in rows
    ]
    print(json.dumps(said | {"plans": plans}, allow_nan=False))


def _print(config: PlanConfig[Any], rows: Sequence[_Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    _, count = device_count(config.device)
    each = " each" if count > 1 else ""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    mesh = f", {config.mesh or f'fsdp={count}'}" if count > 1 else ""
    table.title = (
        f"{config.model} on {config.device}{mesh}: {config.batch} rows of {config.max_length} tokens, {config.dtype}, "
        f"remat {config.remat}"
    )
    names = (
        "peak GB" + each,
        "weights",
        "optimizer",
        "activations",
        "other",
        "fits",
        "Tflop",
        "GB moved",
        "ms at least",
    )
    for name in ("method", *names, "refreshing", "tokens/s at most", "delta MB"):
        table.add_column(name, justify="left" if name in ("method", "fits") else "right")
    for row in rows:
        if row.plan is not None:
            table.add_row(row.method, *_cells(row.plan), f"{(row.delta_bytes or 0) / 1e6:,.1f}")
    console.print(table)
    if count > 1:
        console.print("Sizes, flops and bytes are of each device; what they tell one another is not counted.")
    for row in rows:
        if row.problem is not None:
            console.print(f"{row.method}: {row.problem}", markup=False, highlight=False)


def _cells(plan: StepPlan) -> list[str]:
    sizes = (plan.peak, plan.weights, plan.optimizer, plan.activations, plan.temporaries)
    parts = [f"{size / 1e9:.2f}" if size >= 1e8 else f"{size / 1e9:.1g}" for size in sizes]
    work = [f"{plan.flops / 1e12:.1f}", f"{plan.bytes / 1e9:.1f}"]
    times = [f"{1e3 * plan.seconds:.3g}", f"{1e3 * plan.refresh_seconds:.3g}", f"{plan.tokens_per_second:,.0f}"]
    if not plan.seconds:  # of a CPU nobody knows the speed
        times = ["-", "-", "-"]
    return [*parts, "yes" if plan.fits else f"no, {plan.memory / 1e9:.0f} GB", *work, *times]
