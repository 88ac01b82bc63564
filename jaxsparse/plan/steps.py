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
from jaxsparse.engine.sharding import Sharding
from jaxsparse.engine.tuner import Tuner, TunerState
from jaxsparse.models.sharding import mesh_sizes, partition_spec
from jaxsparse.plan.absent import DEVICES, absent_devices, compile_for, device_count
from jaxsparse.plan.costs import Cost, cost_of

__all__ = ["StepPlan", "absent_sharding", "plan_step"]


@dataclass(frozen=True)
class StepPlan:
    """What one training step takes, of each device where there are several.

    Attributes:
        peak: the most memory in use at a time, in bytes.
        weights: of it the model's weights.
        optimizer: the state beside them: slots, masters, moments.
        temporaries: activations and all else that a step makes and drops.
        memory: what the device has.
        flops: of a step that picks no support.
        refresh_flops: of one that does.
        bytes: that a step moves, at least; of all devices' part one's.
        refresh_bytes: that a picking step moves.
        seconds: that a step takes at least, on a device that computes and moves as fast as it can.
        refresh_seconds: that a picking step takes at least.
        tokens_per_second: of all devices, at most. Of a CPU, whose speed nobody knows, it is 0 as the times are.
    """

    peak: int
    weights: int
    optimizer: int
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


def absent_sharding(device: str, mesh: str | None) -> Sharding | None:
    """Returns how one of our models is divided over devices that are not here; None for a single one.

    Args:
        device: such as "v5e-16".
        mesh: such as "data=2,fsdp=8"; None: all devices along fsdp.

    Raises:
        InputError: see `device_count` and `mesh_sizes`.
    """
    _, count = device_count(device)
    sizes = mesh_sizes(mesh or f"fsdp={count}", count)
    if count == 1:
        return None
    devices = np.array(absent_devices(device)).reshape(tuple(sizes.values()))
    return Sharding(Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)), partition_spec)


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
    costs = [cost_of(step, state, batch, refresh=refresh) for refresh in (False, True)]
    weights = _bytes(shapes[0].params)
    described = DEVICES[name]
    seconds = [_seconds(cost, count, described) for cost in costs]
    return StepPlan(
        peak=compiled.peak_bytes,
        weights=weights,
        optimizer=_bytes(shapes[0]) - weights,
        temporaries=compiled.peak_bytes - _bytes(shapes[0]),
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
    return max(cost.flops / device.flops, cost.bytes / device.bandwidth) / count


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
