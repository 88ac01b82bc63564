"""Compiling for an accelerator that this machine does not have."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsparse.common.errors import InputError

__all__ = ["DEVICES", "Plan", "absent_devices", "compile_for", "device_count", "use_cpu"]


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a GPU.

    Attributes:
        description: as the driver says it.
        capability: CUDA compute capability.
        multiprocessors: how many.
        clock_ghz: boost clock.
        bandwidth: of the device's memory, bytes per second.
        memory: bytes that programs can use.
        level_2_cache: bytes.
        shared_memory: bytes a multiprocessor.
        shared_memory_of_block: bytes a block may ask for.
        flops: of dense products in bfloat16, a second.
        wide_flops: of those in float32, for which JAX takes TF32 unless told otherwise.
    """

    description: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    bandwidth: int
    memory: int
    level_2_cache: int
    shared_memory: int
    shared_memory_of_block: int
    flops: float
    wide_flops: float

    def target_config(self) -> str:
        """Returns the description in XLA's own format, the text of a GpuTargetConfigProto."""
        major, minor = self.capability
        of_chip = {
            "core_count": self.multiprocessors,
            "clock_rate_ghz": self.clock_ghz,
            "memory_bandwidth": self.bandwidth,
            "device_memory_size": self.memory,
            "l2_cache_size": self.level_2_cache,
            "shared_memory_per_core": self.shared_memory,
            "shared_memory_per_block_optin": self.shared_memory_of_block,
        }
        info = " ".join(f"{name}: {value}" for name, value in (_OF_CUDA | of_chip).items())
        return (
            f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 } '
            f'device_description_str: "{self.description}"'
        )


@dataclass(frozen=True)
class Tpu:
    """What XLA's compiler asks about a TPU.

    Attributes:
        topologies: parts of a pod by their number of chips; of the smallest a single chip can be compiled for.
        flops: of dense products in bfloat16, a second, of one chip.
        bandwidth: of its memory, bytes a second.
        memory: its bytes.
    """

    topologies: Mapping[int, str]
    flops: float
    bandwidth: int
    memory: int

    @property
    def wide_flops(self) -> float:
        """Of dense products in float32: JAX rounds their factors to bfloat16 there unless told otherwise."""
        return self.flops


# Of control groups, version 2 and version 1.
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Cpu:
    """The processor that is here, of whose speed nothing is known.

    Attributes:
        flops: unknown.
        wide_flops: unknown.
        bandwidth: unknown.
    """

    flops: float = math.inf
    wide_flops: float = math.inf
    bandwidth: float = math.inf

    @property
    def memory(self) -> int:
        """Bytes of memory: the machine's, or fewer where a container may take no more."""
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        for file in _CONTAINER_LIMITS:
            with contextlib.suppress(OSError, ValueError):  # there is none, or it says "max"
                limits.append(int(file.read_text()))
        return min(limits)


# The same on every GPU since 2020 (CUDA C++ Programming Guide, "Compute Capabilities").
_OF_CUDA = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "fpus_per_core": 128,
    "shared_memory_per_block": 48 * 1024,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
}

DEVICES: dict[str, Gpu | Tpu | Cpu] = {
    # NVIDIA H100 Tensor Core GPU architecture, SXM5 with 80 GB of HBM3.
    "h100": Gpu(
        description="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        multiprocessors=132,
        clock_ghz=1.98,
        bandwidth=3_352_320_000_000,
        memory=79_050_768_384,
        level_2_cache=50 * 2**20,
        shared_memory=228 * 1024,
        shared_memory_of_block=227 * 1024,
        flops=989e12,
        wide_flops=495e12,
    ),
    # Google Cloud, "TPU v5e" and "TPU v5p": system architecture.
    "v5e": Tpu(
        {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
        flops=197e12,
        bandwidth=819_000_000_000,
        memory=16 * 2**30,
    ),
    "v5p": Tpu(
        {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
        flops=459e12,
        bandwidth=2_765_000_000_000,
        memory=95 * 2**30,
    ),
    "cpu": Cpu(),
}
"""Devices that can be compiled for, by name."""

_OF_HOST = 8
"""GPUs of one host."""


def device_count(device: str) -> tuple[str, int]:
    """Returns a device's name and how many there are of it.

    Args:
        device: such as "h100", "h100x8" or "v5e-16": chips, of TPUs.

    Raises:
        InputError: it is unknown, or not to be had in that number.

    Example:
        >>> device_count("v5e-16")
        ('v5e', 16)
    """
    found = re.fullmatch(rf"({'|'.join(DEVICES)})(?:[x-](\d{{1,6}}))?", device)
    name, count = (found[1], int(found[2] or 1)) if found else (device, 1)
    if name not in DEVICES:
        raise InputError(f"device {device!r} is unknown; known: {', '.join(DEVICES)}, or several as h100x8, v5e-16")
    described = DEVICES[name]
    if isinstance(described, Cpu) and count > 1:
        raise InputError(f"device {device!r}: there is one CPU")
    if isinstance(described, Tpu) and count != 1 and count not in described.topologies:
        raise InputError(
            f"device {device!r}: {name} is to be had with {', '.join(map(str, described.topologies))} chips"
        )
    if isinstance(described, Gpu) and not (1 <= count <= _OF_HOST or (count and count % _OF_HOST == 0)):
        raise InputError(f"device {device!r}: GPUs come singly up to {_OF_HOST}, then in multiples of {_OF_HOST}")
    return name, count


@dataclass(frozen=True)
class Plan:
    """A function compiled for a device.

    Attributes:
        compiled: the executable, which can be run here only if it is for this CPU.
        is_here: whether it is.
    """

    compiled: Any
    is_here: bool = False

    @property
    def peak_bytes(self) -> int:
        """The most memory that is in use at a time: arguments, results and temporaries, donated ones once."""
        memory = self.compiled.memory_analysis()
        if self.is_here:
            # XLA's peak on CPUs leaves out the temporaries, which it takes in one piece.
            both = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            return int(both + memory.temp_size_in_bytes)
        return int(memory.peak_memory_in_bytes)

    @property
    def argument_bytes(self) -> int:
        """Memory of the arguments."""
        return int(self.compiled.memory_analysis().argument_size_in_bytes)


def use_cpu() -> None:
    """Keeps JAX from looking for an accelerator here; to be called before the first array is made.

    The plugin that compiles for one complains where none is.
    """
    jax.config.update("jax_platforms", "cpu")


def compile_for(
    device: str,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    donate: tuple[int, ...] = (),
    options: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Plan:
    """Compiles a function for a device that is not here.

    Args:
        device: a name in `DEVICES`.
        function: what to compile.
        arguments: its arguments; arrays, or their shapes, which may have shardings over a mesh of `absent_devices`.
        donate: numbers of the arguments whose memory the function may take.
        options: of XLA's compiler, as `jax.stages.Lowered.compile` takes them.
        mesh: the mesh of those shardings; None: the arguments lie on one device.

    Returns:
        The plan.

    Raises:
        InputError: the device is unknown, or the compiler for it is not installed.
    """
    shapes: Any = tuple(arguments)
    if mesh is None:
        mesh = Mesh(np.array(absent_devices(device)[:1]), ("device",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(lambda *leaves: leaves, *arguments),
        )
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=donate).lower(*shapes).compile(dict(options or {}))
    return Plan(compiled, is_here=isinstance(DEVICES[device_count(device)[0]], Cpu))


def absent_devices(device: str) -> list[Any]:
    """Returns devices that are not here, for a mesh to compile for.

    Args:
        device: as `device_count` takes it.

    Raises:
        InputError: the device is unknown, or the compiler for it is not installed.
    """
    name, count = device_count(device)
    described = DEVICES[name]
    if isinstance(described, Cpu):
        return jax.devices("cpu")[:1]
    topology = _gpus(name, described, count) if isinstance(described, Gpu) else _tpus(name, described, count)
    return list(topology.devices[:count])


def _gpus(device: str, gpu: Gpu, count: int) -> Any:
    shape = f"1x{-(-count // _OF_HOST)}x{min(count, _OF_HOST)}"
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name=shape, topology=shape, target_config=gpu.target_config()
        )
    except NotImplementedError as error:
        version = jax.__version__
        raise InputError(
            f"compiling for {device} needs JAX's CUDA plugin, without NVIDIA's libraries: pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}, and the environment variable JAX_PLATFORMS=cpu"
        ) from error


def _tpus(device: str, tpu: Tpu, count: int) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        wheels = [
            line.partition(";")[0].strip() for line in metadata.requires("jax") or () if line.startswith("libtpu")
        ]
        raise InputError(
            f"compiling for {device} needs Google's compiler: pip install --no-deps {wheels[0]!r}, and the environment "
            "variable JAX_PLATFORMS=cpu"
        )
    # It would ask the network which machine this is. The type of accelerator serves for any topology.
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    shape = tpu.topologies[max(count, min(tpu.topologies))]
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{device}:{shape}")


_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # There is no chip that two processes could quarrel about.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
