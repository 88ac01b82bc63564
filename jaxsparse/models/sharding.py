"""How our models are divided over a mesh: its axes, their sizes in words, and a rule for every parameter."""

import math

from jax.sharding import PartitionSpec

from jaxsparse.common.errors import InputError

__all__ = ["MESH_AXES", "mesh_sizes", "partition_spec", "tensor_parts"]

MESH_AXES = ("data", "fsdp", "tensor")
"""data: rows of a batch; fsdp: rows too, and weights, which are gathered for each product; tensor: the products
themselves."""

# Of (in, out) kernels: outputs of what opens a block are divided as inputs of what closes it.
_OPENS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc"}
_CLOSES = {"o_proj", "down_proj", "c_proj"}


def mesh_sizes(text: str, devices: int) -> dict[str, int]:
    """Returns the sizes of a mesh's axes, those that are not named 1.

    Args:
        text: such as "data=2,fsdp=4".
        devices: how many there are.

    Raises:
        InputError: an axis is unknown or named twice, a size is no positive number, or the sizes do not multiply to
            the number of devices.

    Example:
        >>> mesh_sizes("fsdp=4,tensor=2", 8)
        {'data': 1, 'fsdp': 4, 'tensor': 2}
    """
    whole = _sizes(text)
    if math.prod(whole.values()) != devices:
        raise InputError(
            f"mesh {text!r} has {math.prod(whole.values())} devices, but there are {devices}; data={devices} would work"
        )
    return whole


def tensor_parts(mesh: str | None) -> int:
    """Returns how many tensor shards a mesh has; without a mesh there is one.

    Raises:
        InputError: see `mesh_sizes`.

    Example:
        >>> tensor_parts("fsdp=4,tensor=2"), tensor_parts(None)
        (2, 1)
    """
    return 1 if mesh is None else _sizes(mesh)["tensor"]


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in MESH_AXES:
            raise InputError(f"mesh axis {axis!r} is unknown; a mesh is written as data=2,fsdp=4,tensor=1")
        if not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise InputError(f"mesh {text!r}: {axis} must be given once, as a positive number, got {part.strip()!r}")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def partition_spec(path: str) -> PartitionSpec:
    """Returns how a parameter of our models is divided; what is not a large matrix is whole everywhere.

    Args:
        path: of the parameter.

    Example:
        >>> tuple(partition_spec("layers/self_attn/q_proj/kernel"))
        (None, 'fsdp', 'tensor')
    """
    module, _, leaf = path.rpartition("/")
    name = module.rpartition("/")[2]
    if leaf == "embedding":
        return PartitionSpec("tensor", "fsdp")
    if leaf != "kernel":
        return PartitionSpec()
    if name in _OPENS:
        return PartitionSpec(None, "fsdp", "tensor")
    return PartitionSpec(None, "tensor", "fsdp") if name in _CLOSES else PartitionSpec("fsdp", "tensor")
