"""A delta as a LoRA adapter for Hugging Face's PEFT."""

import json
import os
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_folder, atomic_write_text, check_writable, make_shareable
from jaxsparse.deltas.changes import entry_changes
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.patch import check_base
from jaxsparse.deltas.peft_layout import CONFIG, GAIN, LEFT, PREFIX, RIGHT, WEIGHTS, Linear, LowRank, linears
from jaxsparse.deltas.slicing import in_slices, slices_of_axes
from jaxsparse.deltas.tensors import CoordinateDelta, FactorDelta, SliceDelta, TensorDelta, slice_indices
from jaxsparse.models.configs import Config, GPT2Config

__all__ = ["export_peft"]

_ELSE = "export it merged (--to hugging_face, `export_merged`), or without factors as entries (--to entries)"


def export_peft(
    folder: str | os.PathLike[str],
    delta: Delta,
    *,
    base: PyTree,
    config: Config,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a delta as a LoRA adapter of PEFT: adapter_config.json and adapter_model.safetensors.

    Factors are A and B as they are. Slices are an A of unit rows, which selects them, and a B of what they change by
    (output slices the other way round), with alpha = r. Entries that lie in few inputs or outputs are slices too.
    Factors with a gain are DoRA, whose magnitudes are the gain times the norm of (W + s A B)'s outputs. PEFT adds
    up in the order (x A) B, so its outputs are those of the delta up to rounding.

    Args:
        folder: a folder that is new or empty.
        delta: its tensors are weights of linear modules.
        base: the base's parameters.
        config: the model's configuration.
        base_name: the base, as who loads the adapter names it, such as HuggingFaceTB/SmolLM2-135M; None: as the delta
            calls it.
        base_fingerprint: `fingerprint(base)` where it is known.
        overwrite: replace what is there.

    Raises:
        InputError: the delta belongs to another base, or changes what no LoRA adapter of less than the weight's size
            changes: biases, norms, embeddings, entries all over a matrix. Or the folder cannot be written.

    Example:
        >>> import dataclasses, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> from jaxsparse.models.functional import LanguageModel
        >>> from jaxsparse.models.presets import PRESETS
        >>> config = dataclasses.replace(PRESETS["llama2-7b"], hidden_size=8, intermediate_size=16, num_layers=2,
        ...     num_heads=2, num_kv_heads=2, head_dim=4, vocab_size=32)
        >>> base = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), LanguageModel(config).abstract(jnp.float32))
        >>> tuned = jax.tree.map(lambda leaf: leaf, base)
        >>> kernel = tuned["layers"]["mlp"]["up_proj"]["kernel"]
        >>> tuned["layers"]["mlp"]["up_proj"]["kernel"] = kernel.at[:, 3].set(2.0)
        >>> folder = tempfile.mkdtemp()
        >>> export_peft(folder, diff(base, tuned), base=base, config=config)
        >>> sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    if not delta.tensors:
        raise InputError("the delta changes nothing: there is no adapter to write")
    check_base(base, delta, base_fingerprint=base_fingerprint)
    tensors, modules = tensors_by_path(base, "base"), linears(config)
    found = {path: _low_rank(path, tensor, tensors[path], modules.get(path)) for path, tensor in delta.tensors.items()}
    is_dora = any(part.gain is not None for part in found.values())
    arrays: dict[str, np.ndarray] = {}
    for path, part in found.items():
        arrays |= _arrays(modules[path], part, tensors[path] if is_dora else None)
    ends = {modules[path].suffix: part for path, part in found.items()}
    settings = _settings(ends, config, is_dora, base_name or delta.metadata.base_name)
    check_writable(folder, required_bytes=sum(array.nbytes for array in arrays.values()))
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        atomic_write_text(temporary / CONFIG, json.dumps(settings, indent=2))
        save_file(arrays, temporary / WEIGHTS, metadata={"format": "pt"})
        make_shareable(temporary / WEIGHTS)


def _settings(ends: dict[str, LowRank], config: Config, is_dora: bool, base_name: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; r and alpha are the most frequent, the patterns hold the others."""
    ranks = {end: part.a.shape[2] for end, part in ends.items()}
    alphas = {end: _alpha(part.scale, ranks[end]) for end, part in ends.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": isinstance(config, GPT2Config),
        "target_modules": sorted(ends),
        "rank_pattern": {end: own for end, own in ranks.items() if own != rank},
        "alpha_pattern": {end: own for end, own in alphas.items() if own != alpha},
        "use_rslora": False,
        "use_dora": is_dora,
        "init_lora_weights": True,
    }


def _alpha(scale: float, rank: int) -> int | float:
    """S r; the whole number whose quotient by r is s in float32, where there is one."""
    whole = round(scale * rank)
    return whole if np.float32(whole / rank) == np.float32(scale) else scale * rank


def _arrays(linear: Linear, part: LowRank, weight: Any) -> dict[str, np.ndarray]:
    """What adapter_model.safetensors holds of the layers of one module."""
    arrays = {}
    for layer, module in enumerate(linear.modules):
        a, b = part.a[layer], part.b[layer]
        arrays[f"{PREFIX}{module}{LEFT}"] = np.ascontiguousarray(a.T)
        arrays[f"{PREFIX}{module}{RIGHT}"] = np.ascontiguousarray(b.T)
        if weight is not None:
            gain, norms = 1 if part.gain is None else part.gain[layer], part.output_norms(linear, weight, layer)
            if not np.all(norms):
                raise InputError(f"module {module} has an output of zeros, by whose norm PEFT's DoRA divides; {_ELSE}")
            arrays[f"{PREFIX}{module}{GAIN}"] = (gain * norms).astype(a.dtype)
    return arrays


# ---- what a delta says of one tensor, as factors ---------------------------------------------------------------


def _low_rank(path: str, tensor: TensorDelta, leaf: Any, linear: Linear | None) -> LowRank:
    if linear is None:
        raise InputError(f"tensor {path} is not the weight of a linear module, which LoRA changes; {_ELSE}")
    if isinstance(tensor, FactorDelta | SliceDelta) and tensor.view != linear.view:
        raise InputError(f"the delta reads tensor {path} as other matrices than the model's; {_ELSE}")
    if isinstance(tensor, FactorDelta):
        return LowRank(tensor.a, tensor.b, tensor.scale, tensor.gain)
    assert isinstance(tensor, CoordinateDelta | SliceDelta)
    changes = entry_changes(path, tensor, leaf)
    if isinstance(tensor, SliceDelta):
        return _of_slices(linear, tensor.axis, tensor.slices, changes)
    return _of_entries(path, linear, tensor, changes)


def _of_slices(linear: Linear, axis: str, slices: np.ndarray, changes: np.ndarray) -> LowRank:
    size = linear.view.in_size if axis == "input" else linear.view.out_size
    units = (slices[:, :, None] == np.arange(size)).astype(changes.dtype)
    if axis == "input":
        return LowRank(units.swapaxes(1, 2), changes, 1.0)
    return LowRank(changes.swapaxes(1, 2), units, 1.0)


def _of_entries(path: str, linear: Linear, tensor: CoordinateDelta, changes: np.ndarray) -> LowRank:
    """The slices in which the entries lie."""
    view = linear.view
    # The rank counts here, and not how many weights the slices have.
    axis, slices, _ = min(slices_of_axes(view, tensor.indices), key=lambda one: one[1].shape[1])
    rank = slices.shape[1]
    if rank * (view.in_size + view.out_size) > view.size:
        raise InputError(
            f"tensor {path} changes in {rank} {axis} slices of a matrix of {view.in_size} x {view.out_size}: "
            f"a LoRA adapter of that rank is larger than the weight; {_ELSE}"
        )
    places = slice_indices(view, axis, slices)
    return _of_slices(linear, axis, slices, in_slices(places, tensor.indices, changes))
