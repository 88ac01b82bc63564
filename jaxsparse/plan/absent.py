"""Compiling for an accelerator that this machine does not have."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsparse.common.errors import InputError

__all__ = ["DEVICES", "Plan", "compile_for", "use_cpu"]


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
        topology: the smallest part of a pod that has a name; one chip of it is compiled for.
    """

    topology: str


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

DEVICES: dict[str, Gpu | Tpu] = {
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
    ),
    "v5e": Tpu("v5e:2x2"),
    "v5p": Tpu("v5p:2x2x1"),
}
"""Devices that can be compiled for, by name."""


@dataclass(frozen=True)
class Plan:
    """A function compiled for a device.

    Attributes:
        compiled: the executable, which cannot be run here.
    """

    compiled: Any

    @property
    def peak_bytes(self) -> int:
        """The most memory that is in use at a time: arguments, results and temporaries, donated ones once."""
        return int(self.compiled.memory_analysis().peak_memory_in_bytes)

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
) -> Plan:
    """Compiles a function for a device that is not here.

    Args:
        device: a name in `DEVICES`.
        function: what to compile.
        arguments: its arguments; arrays, or their shapes.
        donate: numbers of the arguments whose memory the function may take.
        options: of XLA's compiler, as `jax.stages.Lowered.compile` takes them.

    Returns:
        The plan.

    Raises:
        InputError: the device is unknown, or the compiler for it is not installed.
    """
    mesh = Mesh(np.array(_topology(device).devices[:1]), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def there(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    shapes = jax.tree.map(there, jax.eval_shape(lambda *leaves: leaves, *arguments))
    with jax.set_mesh(mesh):
        return Plan(jax.jit(function, donate_argnums=donate).lower(*shapes).compile(dict(options or {})))


def _topology(device: str) -> Any:
    if device not in DEVICES:
        raise InputError(f"device {device!r} is unknown; known: {', '.join(DEVICES)}")
    described = DEVICES[device]
    return _gpus(device, described) if isinstance(described, Gpu) else _tpus(device, described)


def _gpus(device: str, gpu: Gpu) -> Any:
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=gpu.target_config()
        )
    except NotImplementedError as error:
        version = jax.__version__
        raise InputError(
            f"compiling for {device} needs JAX's CUDA plugin, without NVIDIA's libraries: pip install --no-deps "
            f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}, and the environment variable JAX_PLATFORMS=cpu"
        ) from error


def _tpus(device: str, tpu: Tpu) -> Any:
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
    return topologies.get_topology_desc(platform="tpu", topology_name=tpu.topology)


_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # There is no chip that two processes could quarrel about.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
