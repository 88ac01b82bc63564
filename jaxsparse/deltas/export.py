"""Deltas for torch: the entries as a safetensors file, or merged into a Hugging Face checkpoint."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_bytes, check_writable
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas.bits import gather_bits
from jaxsparse.deltas.changes import moved_entries
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.patch import apply, check_base
from jaxsparse.deltas.tensors import CoordinateDelta, SliceDelta
from jaxsparse.models.configs import Config
from jaxsparse.models.layouts import Parameter, parameters_of, tensor_name

if TYPE_CHECKING:
    from jaxsparse.models.checkpoints import Checkpoint

__all__ = ["export_entries", "export_merged"]


def export_entries(
    file: str | os.PathLike[str],
    delta: Delta,
    *,
    base: PyTree,
    config: Config,
    base_fingerprint: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the entries that a delta changes as a safetensors file that a few lines of torch apply and revert.

    For every tensor of Hugging Face's model: `NAME.index`, int64, positions in the flattened tensor, increasing;
    `NAME.old` and `NAME.new`, the weights before and after. The README has the lines.

    Args:
        file: the file to make.
        delta: coordinates and slices.
        base: the base's parameters.
        config: the model's configuration.
        base_fingerprint: `fingerprint(base)` where it is known.
        overwrite: replace what is there.

    Raises:
        InputError: the delta belongs to another base or keeps factors, which change all weights; or the file is there
            or cannot be written.
    """
    target = Path(file)
    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already; give another file, or allow overwriting")
    check_writable(target.parent)
    check_base(base, delta, base_fingerprint=base_fingerprint)
    tensors, parameters = tensors_by_path(base, "base"), {own.path: own for own in parameters_of(config)}
    arrays: dict[str, np.ndarray] = {}
    for path, tensor in delta.tensors.items():
        if not isinstance(tensor, CoordinateDelta | SliceDelta):
            raise InputError(
                f"tensor {path} changes by factors, which change all of its weights; export it merged "
                "(--to hugging_face, `export_merged`), or for PEFT (--to peft, `export_peft`)"
            )
        if path not in parameters:
            raise InputError(f"the model that config describes has no tensor {path}")
        arrays |= _arrays(config, parameters[path], tensor, tensors[path])
    atomic_write_bytes(target, safetensors.numpy.save(arrays, {"format": "pt"}))


def _arrays(
    config: Config, parameter: Parameter, tensor: CoordinateDelta | SliceDelta, leaf: Any
) -> dict[str, np.ndarray]:
    """The entries of every layer, where Hugging Face's tensor has them."""
    indices, places = moved_entries(tensor)
    old = gather_bits(leaf, indices)
    new = old ^ tensor.xor.reshape(-1)[places]
    arrays = {}
    for layer in parameter.layers:
        own_size = tensor.size // len(parameter.layers)
        first, last = np.searchsorted(indices, [layer * own_size, (layer + 1) * own_size])
        if first == last:
            continue
        index = indices[first:last].astype(np.int64) - layer * own_size
        if parameter.transposed:
            rows, columns = parameter.file_shape
            index = index % rows * columns + index // rows
        order = np.argsort(index)
        name = tensor_name(config, parameter.path, layer)
        arrays[f"{name}.index"] = index[order]
        for side, bits in (("old", old), ("new", new)):
            arrays[f"{name}.{side}"] = bits[first:last][order].view(leaf.dtype)
    return arrays


def export_merged(
    folder: str | Path, delta: Delta, base: "Checkpoint", *, name: str | None = None, overwrite: bool = False
) -> "Checkpoint":
    """Writes the tuned model as a Hugging Face checkpoint; base and delta may be of any kind.

    Args:
        folder: a folder that is new or empty.
        delta: the delta.
        base: its base, with tokenizer, which is written too.
        name: what reports call the tuned model; None: as the base.
        overwrite: replace what is there.

    Returns:
        The tuned checkpoint.

    Raises:
        InputError: the delta belongs to another base, or the folder cannot be written.
    """
    # Imported late: it brings tokenizers along, for which who trains need not wait.
    from jaxsparse.models.checkpoints import export_hugging_face

    params: Any = apply(base.params, delta, base_fingerprint=base.fingerprint)
    tuned = dataclasses.replace(base, params=params, name=name or base.name, fingerprint=fingerprint(params))
    return export_hugging_face(folder, tuned, overwrite=overwrite)
