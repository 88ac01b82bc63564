"""What a training step takes of devices that are not here: memory by real compilation, time by what it must compute."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.engine.fused import FusedTuner
from jaxsparse.engine.sharding import Selection, Sharding, row_parts
from jaxsparse.engine.tuner import Tuner, TunerState
from jaxsparse.models.sharding import mesh_sizes, partition_spec
from jaxsparse.plan.absent import DEVICES, absent_devices, compile_for, device_count
from jaxsparse.plan.costs import Cost, cost_of, kept_for_backward

__all__ = ["StepPlan", "absent_mesh", "absent_sharding", "plan_step"]


@dataclass(frozen=True)
class StepPlan:
    """What one training step takes, of each device where there are several.

    Attributes:
        peak: the most memory in use at a time, in bytes.
        weights: of it the model's weights.
        optimizer: the state beside them: slots, masters, moments.
        activations: of it what the forward pass keeps of all layers for the backward pass, by the step's jaxpr; never
            more than what is left beside weights and optimizer.
        temporaries: all else that a step makes and drops.
        memory: what the device has.
        flops: of a step that picks no support.
        refresh_flops: of one that does.
        bytes: that a step moves, at least: those of its products, and state, gradient and weight of every entry that
            is trained, read and written once; of all devices' part one's.
        refresh_bytes: that a picking step moves.
        seconds: that a step takes at least, on a device that computes and moves as fast as it can.
        refresh_seconds: that a picking step takes at least.
        tokens_per_second: of all devices, at most. Of a CPU, whose speed nobody knows, it is 0 as the times are.
    """

    peak: int
    weights: int
    optimizer: int
    activations: int
    temporaries: int
    memory: int
    flops: float
    refresh_flops: float
    bytes: float
    refresh_bytes: float
    seconds: float
    refresh_seconds: float
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.peak <= self.memory


def absent_mesh(device: str, mesh: str | None) -> dict[str, int]:
    """Returns the sizes of the axes by which devices that are not here divide a model.

    Args:
        device: such as "v5e-16".
        mesh: such as "data=2,fsdp=8"; None: all devices along fsdp.

    Raises:
        InputError: see `device_count` and `mesh_sizes`.

    Example:
        >>> absent_mesh("v5e-16", "fsdp=8,tensor=2")
        {'data': 1, 'fsdp': 8, 'tensor': 2}
    """
    _, count = device_count(device)
    return mesh_sizes(f"fsdp={count}" if mesh is None else mesh, count)


def absent_sharding(device: str, mesh: str | None, selection: Selection = "per_shard") -> Sharding | None:
    """Returns how one of our models is divided over devices that are not here; None for a single one.

    Args:
        device: such as "v5e-16".
        mesh: as `absent_mesh` takes it.
        selection: as `js.Sharding` takes it.

    Raises:
        InputError: as `absent_mesh`.
    """
    sizes = absent_mesh(device, mesh)
    if math.prod(sizes.values()) == 1:
        return None
    devices = np.array(absent_devices(device)).reshape(tuple(sizes.values()))
    axes = Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return Sharding(axes, partition_spec, selection=selection)


def plan_step(
    tuner: Tuner, params: PyTree, batch: PyTree, device: str, *, sharding: Sharding | None = None
) -> StepPlan:
    """Compiles a training step for devices that are not here, and says what it takes.

    Args:
        tuner: makes the step.
        params: shapes of the parameters.
        batch: shapes of a batch, of which `tokens` counts the tokens.
        device: as `device_count` takes it.
        sharding: how the model is divided, as `absent_sharding` returns it.

    Raises:
        InputError: the step cannot be compiled for the device, or the batch not be shared.
    """
    name, count = device_count(device)
    state = jax.eval_shape(tuner.init, params)
    shapes: Any = (state, batch)
    if sharding is not None:
        shapes = _placed(tuner, state, sharding), _struct(batch, sharding.of_batch(batch))
    step = getattr(tuner.step, "__wrapped__", tuner.step)
    mesh = None if sharding is None else sharding.mesh
    try:
        compiled = compile_for(device, step, shapes, donate=(0,), mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"it does not fit in {device}: {_first_line(error)}") from error
    weights, optimizer = _bytes(shapes[0].params), _bytes(shapes[0].method)
    moved = count * _bytes_of_update(tuner, state, optimizer)
    costs = [cost_of(step, state, batch, refresh=refresh) + Cost(bytes=moved) for refresh in (False, True)]
    described = DEVICES[name]
    seconds = [_seconds(cost, count, described) for cost in costs]
    rest = compiled.peak_bytes - weights - optimizer
    kept = kept_for_backward(step, state, batch) / row_parts(sharding)
    activations = max(0, min(round(kept), rest))
    return StepPlan(
        peak=compiled.peak_bytes,
        weights=weights,
        optimizer=optimizer,
        activations=activations,
        temporaries=rest - activations,
        memory=described.memory,
        flops=costs[0].flops / count,
        refresh_flops=costs[1].flops / count,
        bytes=costs[0].bytes / count,
        refresh_bytes=costs[1].bytes / count,
        seconds=seconds[0],
        refresh_seconds=seconds[1],
        tokens_per_second=math.prod(batch.tokens.shape) / seconds[0] if seconds[0] else 0.0,
    )


def _seconds(cost: Cost, count: int, device: Any) -> float:
    computing = (cost.flops - cost.wide_flops) / device.flops + cost.wide_flops / device.wide_flops
    return max(computing, cost.bytes / device.bandwidth) / count


def _bytes_of_update(tuner: Tuner, state: TunerState, optimizer: int) -> float:
    """What updating moves on a device: the optimizer's state, and gradient and weight of every entry that is trained.

    Each is read and written once, however well XLA fuses: elementwise work, which `cost_of` leaves out.
    """
    share = optimizer / max(_whole_bytes(state.method), 1)
    entries = jax.tree.leaves(tuner.description.slots(state.params))
    # Gradients and weights have the width of the weights, the widest of them.
    width = max((jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state.params)), default=0)
    trained = sum(math.prod(entry.shape) for entry in entries)
    return 2 * optimizer + 4 * width * trained * share


def _whole_bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _placed(tuner: Tuner, state: TunerState, sharding: Sharding) -> TunerState:
    """The state's shapes, each with the sharding that training gives it."""
    if isinstance(tuner, FusedTuner) and tuner.sharding is not None:
        return tuner.placed(state, _struct_of)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    params = _struct(state.params, sharding.of(state.params))
    return state._replace(params=params, method=jax.tree.map(lambda leaf: _struct_of(leaf, everywhere), state.method))


def _struct_of(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _struct(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(_struct_of, tree, shardings)


def _bytes(tree: PyTree) -> int:
    """Bytes of one device's part."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape for leaf in leaves]
    return sum(math.prod(shape) * jnp.dtype(leaf.dtype).itemsize for shape, leaf in zip(shapes, leaves, strict=True))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
