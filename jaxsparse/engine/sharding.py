"""Weights divided between devices: what each device does to its own part, and the little that it tells the others."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Num, PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.subspaces.targets import MatrixView, ResolvedTarget, matrix_view

__all__ = ["Divided", "Selection", "Sharding", "row_parts", "shared_equally"]

Selection = Literal["per_shard", "global"]
Axes = tuple[str, ...]


@dataclass(frozen=True)
class Sharding:
    """How a model, its batches and its slots are divided between the devices of a mesh.

    Weights are divided as `specs` says; a batch's rows over `rows`, along which weights are gathered for a product
    (FSDP). An axis that divides weights and no rows is one of tensor parallelism: there products are divided too.

    Attributes:
        mesh: the devices.
        specs: from a parameter's path to how it is divided.
        rows: the axes over which a batch's rows are divided.
        selection: who picks entries by the gradient. "per_shard": every tensor shard picks an equal part of k among its
            own entries and owns these slots, and nothing but the scalar retention is communicated. "global": the
            support of one device, from the shards' candidates, k numbers each.

    Raises:
        InputError: an axis is unknown, or the selection.

    Example:
        >>> mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        >>> sharding = Sharding(mesh, lambda path: PartitionSpec(None, "tensor"), rows=("data",))
        >>> tuple(sharding.of({"kernel": jnp.zeros((2, 3))})["kernel"].spec)
        (None, 'tensor')
    """

    mesh: Mesh
    specs: Callable[[str], PartitionSpec]
    rows: Axes = ("data", "fsdp")
    selection: Selection = "per_shard"

    def __post_init__(self) -> None:
        if self.selection not in get_args(Selection):
            raise InputError(f"selection={self.selection!r} must be one of {', '.join(get_args(Selection))}")
        unknown = [axis for axis in self.rows if axis not in self.mesh.shape]
        if unknown:
            raise InputError(
                f"rows are to be divided over {unknown[0]!r}, but the mesh's axes are {', '.join(self.mesh.axis_names)}"
            )

    @property
    def row_parts(self) -> int:
        """How many devices share the rows of a batch."""
        return _parts(self.mesh, self.rows)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns how a parameter is divided, one entry an axis.

        Raises:
            InputError: the mesh lacks an axis, or does not divide the parameter.
        """
        given = tuple(self.specs(path))
        if len(given) > len(shape):
            raise InputError(f"parameter {path} of shape {shape} has fewer axes than its PartitionSpec{given}")
        spec = (*given, *[None] * (len(shape) - len(given)))
        for size, axes in zip(shape, spec, strict=True):
            unknown = [axis for axis in _names(axes) if axis not in self.mesh.shape]
            if unknown:
                raise InputError(f"parameter {path} is divided over {unknown[0]!r}, which the mesh does not have")
            if size % (parts := _parts(self.mesh, _names(axes))):
                sizes = ", ".join(str(n) for n in range(1, min(size, self.mesh.size) + 1) if size % n == 0)
                raise InputError(
                    f"parameter {path} has an axis of {size}, which {parts} devices cannot share equally along "
                    f"{' and '.join(_names(axes))}; sizes that work: {sizes}"
                )
        return _trimmed(spec)

    def of(self, params: PyTree) -> PyTree:
        """Returns how every parameter is divided, a tree of `NamedSharding`s."""
        pairs, structure = flatten_with_paths(params)
        return jax.tree.unflatten(
            structure, [NamedSharding(self.mesh, self.spec(path, tuple(leaf.shape))) for path, leaf in pairs]
        )

    def of_batch(self, batch: PyTree) -> PyTree:
        """Returns how the arrays of a batch are divided, by their first axis.

        Raises:
            InputError: the rows cannot be shared equally.
        """
        parts = self.row_parts
        for leaf in jax.tree.leaves(batch):
            if leaf.shape[0] % parts:
                raise InputError(f"a batch of {leaf.shape[0]} rows cannot be shared by {parts} devices equally")
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, PartitionSpec(self.rows)), batch)

    def divided(self, target: ResolvedTarget, *, picks: bool) -> "Divided | None":
        """Returns how one target is divided; None where JAX is left to find out how to read and write it.

        Args:
            target: the target.
            picks: whether its entries are picked by the gradient, so that shards can pick their own.

        Raises:
            InputError: it is divided along its layers.
        """
        view = target.view
        if not view.is_in_order or len(view.shape) != view.layer_axes + 2:
            return None
        spec = tuple(self.spec(target.path, view.shape))
        spec += (None,) * (len(view.shape) - len(spec))
        if any(spec[: view.layer_axes]):
            raise InputError(f"parameter {target.path} is divided along its layers; divide its inputs or outputs")
        inputs, outputs = (_names(axes) for axes in spec[view.layer_axes :])
        return Divided(self.mesh, inputs, outputs, self.rows, picks and self.selection == "per_shard")


def _names(axes: Any) -> Axes:
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def _trimmed(spec: tuple[Any, ...]) -> PartitionSpec:
    """Without trailing axes that are not divided: jitted functions return it so, and compile once if they get it so."""
    last = max((at + 1 for at, axes in enumerate(spec) if axes), default=0)
    return PartitionSpec(*spec[:last])


def _parts(mesh: Mesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


@dataclass(frozen=True)
class Divided:
    """How the matrices of one target are divided; each lies as (in, out).

    Attributes:
        mesh: the devices.
        inputs: the axes over which its inputs are divided.
        outputs: those of its outputs.
        rows: those of a batch's rows.
        per_shard: whether every tensor shard owns an equal part of the slots.
    """

    mesh: Mesh
    inputs: Axes
    outputs: Axes
    rows: Axes
    per_shard: bool

    @property
    def tensor_inputs(self) -> Axes:
        """The axes over which a product's inputs are divided: weights are gathered along the others."""
        return tuple(axis for axis in self.inputs if axis not in self.rows)

    @property
    def tensor_outputs(self) -> Axes:
        """The axes over which a product's outputs are divided."""
        return tuple(axis for axis in self.outputs if axis not in self.rows)

    @property
    def tensor(self) -> Axes:
        """The axes of tensor parallelism."""
        return (*self.tensor_inputs, *self.tensor_outputs)

    @property
    def shards(self) -> int:
        """How many shards pick slots of their own."""
        return _parts(self.mesh, self.tensor) if self.per_shard else 1

    @property
    def owners(self) -> Axes:
        """The axes over which slots are divided."""
        return self.tensor if self.per_shard else ()

    def starts(self, inputs: Axes, outputs: Axes, sizes: tuple[int, int]) -> tuple[Array, Array]:
        """Returns the first input and output of this device's part, whose sizes are given."""
        first = (jax.lax.axis_index(axes) if axes else jnp.zeros((), jnp.int32) for axes in (inputs, outputs))
        row, column = (start.astype(jnp.int32) * size for start, size in zip(first, sizes, strict=True))
        return row, column

    def mapped(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Returns a function of whole arrays that maps one over the devices' parts."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    # ---- slots of a weight -------------------------------------------------------------------------------------

    def of_slots(self) -> PartitionSpec:
        """Returns how arrays (stack, slots, ...) are divided."""
        return _trimmed((None, self.owners or None))

    def sharding_of_slots(self) -> NamedSharding:
        """Returns where the slots of single units lie: with the shards that own them, or everywhere."""
        return NamedSharding(self.mesh, self.of_slots())

    def sharding_of_whole(self) -> NamedSharding:
        """Returns where slots (stack, 1, in, out) of whole matrices lie: where the weights do."""
        return NamedSharding(self.mesh, _trimmed((None, None, self.inputs or None, self.outputs or None)))

    def of_weight(self) -> PartitionSpec:
        """Returns how matrices (stack, in, out) are divided."""
        return PartitionSpec(None, self.inputs or None, self.outputs or None)

    def own_index(
        self, view: MatrixView, index: Int[Array, "stack ..."], own: tuple[int, int]
    ) -> tuple[Int[Array, "stack ..."], MatrixView]:
        """Returns where entries lie in this device's part of a matrix, and how that is read.

        Args:
            view: of the whole weight.
            index: flat indices in its matrices.
            own: inputs and outputs of the part.

        Returns:
            The part's flat indices, its size for entries of others; and its view.
        """
        row, column = self.starts(self.inputs, self.outputs, own)
        rows, columns = index // view.out_size - row, index % view.out_size - column
        here = (rows >= 0) & (rows < own[0]) & (columns >= 0) & (columns < own[1])
        part = matrix_view((view.stack, *own), (0,), (1,), (2,))
        return jnp.where(here & (index < view.size), rows * own[1] + columns, own[0] * own[1]), part

    def read(
        self,
        read: Callable[[MatrixView, Array, Array], Array],
        view: MatrixView,
        weight: Num[Array, "..."],
        index: Int[Array, "stack ..."],
    ) -> Num[Array, "stack ..."]:
        """Returns entries of a divided weight: every device reads its own, and their bits are summed.

        Args:
            read: from a view, a weight and flat indices to the entries, 0 for those beyond.
            view: of the whole weight.
            weight: the weight.
            index: flat indices in its matrices.
        """
        bits = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
        wide = jnp.promote_types(bits, jnp.uint32)
        others = tuple(axis for axis in (*self.inputs, *self.outputs) if axis not in self.owners)

        def own(weight: Array, index: Array) -> Array:
            place, part = self.own_index(view, index, (weight.shape[1], weight.shape[2]))
            found = jax.lax.bitcast_convert_type(read(part, weight, place), bits).astype(wide)
            return jax.lax.bitcast_convert_type(jax.lax.psum(found, others).astype(bits), weight.dtype)

        slots = self.of_slots()
        whole = weight.reshape(view.stack, view.in_size, view.out_size)
        return self.mapped(own, (self.of_weight(), slots), slots)(whole, index)

    def write(
        self,
        write: Callable[[MatrixView, Array, Array, Array], Array],
        view: MatrixView,
        weight: Num[Array, "..."],
        index: Int[Array, "stack ..."],
        values: Num[Array, "stack ..."],
    ) -> Num[Array, "..."]:
        """Returns a divided weight with entries replaced: every device writes its own.

        Args:
            write: from a view, a weight, flat indices and values to the weight; those beyond are dropped.
            view: of the whole weight.
            weight: the weight.
            index: flat indices in its matrices, distinct within one.
            values: what the entries are to be.
        """

        def own(weight: Array, index: Array, values: Array) -> Array:
            place, part = self.own_index(view, index, (weight.shape[1], weight.shape[2]))
            return write(part, weight, place, values)

        slots = self.of_slots()
        whole = weight.reshape(view.stack, view.in_size, view.out_size)
        written = self.mapped(own, (self.of_weight(), slots, slots), self.of_weight())(whole, index, values)
        return written.reshape(weight.shape)


def row_parts(sharding: Sharding | None) -> int:
    """Returns how many devices share the rows of a batch; 1 where nothing is divided."""
    return 1 if sharding is None else sharding.row_parts


def shared_equally(divided: Divided, path: str, support: Int[Array, "stack k ..."]) -> Int[Array, "stack slots ..."]:
    """Returns a support of as many slots as shards can own equal parts of: a few fewer, where k is no multiple.

    Args:
        divided: how the target is divided.
        path: of the target.
        support: its support.

    Raises:
        InputError: there are fewer slots than shards.
    """
    count, shards = support.shape[1], divided.shards
    if shards > 1 and count < shards:  # alone, a matrix may have none at all under a global budget
        raise InputError(
            f"parameter {path} has {count} slots a matrix, fewer than the {shards} shards that pick their own: give a "
            "larger density or budget, fewer tensor shards, or selection='global' (--selection global)"
        )
    return support[:, : count // shards * shards]
