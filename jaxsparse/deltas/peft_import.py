"""A LoRA adapter of Hugging Face's PEFT as a delta."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, PyTree
from safetensors import SafetensorError, safe_open

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import read_json
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas.bits import gather_bits
from jaxsparse.deltas.changes import added_bits
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.merge import factor_delta
from jaxsparse.deltas.peft_layout import (
    CONFIG,
    GAIN,
    LEFT,
    PREFIX,
    RIGHT,
    WEIGHTS,
    Linear,
    LowRank,
    linears,
    pattern_value,
)
from jaxsparse.deltas.slicing import slice_delta
from jaxsparse.deltas.tensors import FactorDelta, SliceDelta, slice_indices
from jaxsparse.models.configs import Config

__all__ = ["import_peft"]

# Settings that say nothing of what the adapter computes, or that are checked one by one; any other must not be set.
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora"),
    *("init_lora_weights", "bias", "qalora_group_size", "megatron_core", "eva_config", "runtime_config"),
}
# Other beginnings take something off the base's weights, to which the adapter then no longer belongs.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
_LARGEST = 1e30
# PEFT saves an untied head too, where it adapts it.
_HEAD, _HEAD_PATH = f"{PREFIX}lm_head.base_layer.weight", "lm_head/kernel"
_DTYPES = ("F64", "F32", "F16", "BF16")


class _Settings(NamedTuple):
    """What an adapter's settings say of what it computes."""

    rank: int
    alpha: float
    ranks: Mapping[str, int | float]
    alphas: Mapping[str, int | float]
    rank_stabilised: bool
    has_gain: bool
    record: Mapping[str, Any]
    base_name: str | None

    def scale(self, module: str, rank: int) -> float:
        """The scale s of a module: alpha / r, or rsLoRA's alpha / √r."""
        alpha = pattern_value(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def import_peft(
    folder: str | os.PathLike[str],
    *,
    base: PyTree,
    config: Config,
    base_fingerprint: str | None = None,
    base_name: str | None = None,
) -> Delta:
    """Reads a LoRA adapter of PEFT as a delta: adapter_config.json and adapter_model.safetensors.

    LoRA, rsLoRA and DoRA of linear modules, with any ranks and alphas. A product whose A (or B) is of unit rows, as
    `export_peft` writes slices, becomes slices, each weight plus its change rounded once; any other stays factors.
    Nothing is unpickled: adapter_model.bin is not opened.

    Args:
        folder: the adapter.
        base: the base's parameters.
        config: the model's configuration.
        base_fingerprint: `fingerprint(base)` where it is known.
        base_name: the base's name, for people; None: as the adapter calls it.

    Returns:
        The delta.

    Raises:
        InputError: a file is missing, damaged or not LoRA's; the adapter does what a delta cannot say, such as new
            embeddings or a trained bias; or it does not fit the model.

    Example: see `export_peft`.
    """
    settings = _settings(read_json(Path(folder) / CONFIG))
    modules, tensors = linears(config), tensors_by_path(base, "base")
    for path, linear in modules.items():
        if path not in tensors or tuple(tensors[path].shape) != linear.view.shape:
            raise InputError(f"base has no tensor {path} of shape {linear.view.shape}, as config says; they must agree")
    parts = _parts(Path(folder), modules, settings, tensors.get(_HEAD_PATH))
    found: dict[str, FactorDelta | SliceDelta] = {}
    for path, linear in modules.items():
        own = {layer: parts[module] for layer, module in enumerate(linear.modules) if module in parts}
        if own:
            found[path] = _delta(path, tensors[path], linear, own, settings)
    metadata = Metadata(
        "dora" if settings.has_gain else "lora",
        settings.record,
        base_name=base_name or settings.base_name,
        base_fingerprint=base_fingerprint or fingerprint(base),
    )
    return Delta(found, metadata)


# ---- the files -------------------------------------------------------------------------------------------------


def _settings(content: Mapping[str, Any]) -> _Settings:
    if content.get("peft_type") != "LORA":
        raise InputError(f"{CONFIG}: peft_type is {str(content.get('peft_type'))[:40]!r}; only LORA can be imported")
    if content.get("bias", "none") != "none":
        raise InputError(f"{CONFIG}: bias is {str(content['bias'])[:40]!r}: trained biases cannot be imported")
    if (start := content.get("init_lora_weights", True)) not in _STARTS:
        raise InputError(
            f"{CONFIG}: init_lora_weights is {str(start)[:40]!r}, which changes the base's weights; save the adapter "
            "by PEFT's path_initial_model_for_weight_conversion, which makes it one for the base as it was"
        )
    for name, value in content.items():
        if name not in _KNOWN and value not in (None, False, "", 0) and value not in ([], {}):
            raise InputError(f"{CONFIG}: {name[:40]} is {str(value)[:40]!r}, which cannot be imported")
    patterns = {name: _pattern(name, content.get(name)) for name in ("rank_pattern", "alpha_pattern")}
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if not isinstance(rank, int) or not _is_number(rank) or rank < 1 or not _is_number(alpha):
        raise InputError(f"{CONFIG}: r and lora_alpha are {str(rank)[:40]!r} and {str(alpha)[:40]!r}, not numbers")
    base_name, rank_stabilised = content.get("base_model_name_or_path"), bool(content.get("use_rslora"))
    record = {"from": "peft", "r": rank, "lora_alpha": alpha, "use_rslora": rank_stabilised}
    return _Settings(
        rank,
        float(alpha),  # type: ignore[arg-type]
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        rank_stabilised,
        bool(content.get("use_dora")),
        record,
        base_name if isinstance(base_name, str) and base_name.isprintable() and base_name else None,
    )


def _pattern(name: str, value: Any) -> dict[str, int | float]:
    pattern = {} if value is None else value
    if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
        raise InputError(f"{CONFIG}: {name} is {str(value)[:40]!r}, not numbers by modules")
    pattern = {str(key).replace("\\.", "."): value for key, value in pattern.items()}
    for key in pattern:
        # PEFT takes keys for regular expressions; names are all that is needed, and no expression can run wild.
        if set(key) & set("*+?()[]{}|\\$"):
            raise InputError(f"{CONFIG}: {name} has the key {key[:40]!r}; only names of modules can be imported")
    return pattern


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < _LARGEST


def _parts(
    folder: Path, modules: Mapping[str, Linear], settings: _Settings, head: Any
) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
    """Returns the arrays of every module, in float32, after all checks of names and shapes."""
    file = folder / WEIGHTS
    if not file.is_file():
        hint = "; pickled weights are never read, save them as safetensors" if any(folder.glob("*.bin")) else ""
        raise InputError(f"{folder} has no {WEIGHTS}{hint}")
    views = {module: linear.view for linear in modules.values() for module in linear.modules}
    try:
        with safe_open(file, framework="numpy") as held:
            keys = [*held.keys()]
            shapes = {key: tuple(held.get_slice(key).get_shape()) for key in keys if key != _HEAD}
            if _HEAD in keys and (head is None or not _is_same(held.get_tensor(_HEAD), head)):
                raise InputError(f"{file}: {_HEAD} is not the base's: the adapter comes with another head")
            dtypes = {key: held.get_slice(key).get_dtype() for key in keys}
            parts = _named(shapes, views)
            _check_shapes(parts, shapes, views, settings)
            for key, dtype in dtypes.items():
                if dtype not in _DTYPES:
                    raise InputError(f"{file}: {key[:120]} is of dtype {dtype}; expected {', '.join(_DTYPES)}")
            found = {
                module: {part: held.get_tensor(key).astype(np.float32) for part, key in own.items()}
                for module, own in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a safetensors file, or truncated: {error}") from error
    for module, own in found.items():
        if not all(np.all(np.isfinite(array)) for array in own.values()):
            raise InputError(f"{file}: module {module} has entries that are not finite")
    return found


def _is_same(held: np.ndarray, head: Any) -> bool:
    return held.T.shape == tuple(head.shape) and np.array_equal(held.T.astype(head.dtype), np.asarray(head))


def _named(keys: Mapping[str, Any], views: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns the key of every part of every module."""
    parts: dict[str, dict[str, str]] = {}
    for key in keys:
        part = next((part for part in (LEFT, RIGHT, GAIN) if key.endswith(part)), None)
        module = key.removeprefix(PREFIX).removesuffix(part or "")
        if part is None or not key.startswith(PREFIX) or module not in views:
            raise InputError(f"{WEIGHTS} holds {key[:120]!r}, which is not LoRA's of a linear module of this model")
        parts.setdefault(module, {})[part] = key
    if not parts:
        raise InputError(f"{WEIGHTS} holds no tensors")
    return parts


def _check_shapes(
    parts: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    views: Mapping[str, Any],
    settings: _Settings,
) -> None:
    for module, keys in parts.items():
        view, rank = views[module], int(pattern_value(settings.ranks, module, settings.rank))
        wanted: dict[str, tuple[int, ...]] = {LEFT: (rank, view.in_size), RIGHT: (view.out_size, rank)}
        wanted |= {GAIN: (view.out_size,)} if settings.has_gain else {}
        if keys.keys() != wanted.keys():
            names = " and ".join(part.split(".")[1] for part in wanted.keys() ^ keys.keys())
            raise InputError(f"{WEIGHTS}: {names} of module {module} is missing, or is not to be there")
        for part, shape in wanted.items():
            if shapes[keys[part]] != shape:
                raise InputError(
                    f"{WEIGHTS}: {keys[part]} has shape {shapes[keys[part]]}, "
                    f"but by {CONFIG} and the model it is {shape}"
                )


# ---- one tensor ------------------------------------------------------------------------------------------------


def _delta(
    path: str, leaf: Any, linear: Linear, parts: Mapping[int, Mapping[str, np.ndarray]], settings: _Settings
) -> FactorDelta | SliceDelta:
    factors = _joined(linear, parts, settings)
    if settings.has_gain:
        gain = _gain(linear, leaf, factors, parts)
        return factor_delta(leaf, linear.view, factors.a, factors.b, factors.scale, gain)
    a, b = factors.a, factors.b
    for axis, units, changes in (("input", a, b), ("output", b.swapaxes(1, 2), a.swapaxes(1, 2))):
        slices = _selected(units)
        if slices is not None:
            return _slices(path, leaf, linear, axis, slices, np.float32(factors.scale) * changes)
    return factor_delta(leaf, linear.view, a, b, factors.scale)


def _joined(linear: Linear, parts: Mapping[int, Mapping[str, np.ndarray]], settings: _Settings) -> LowRank:
    """The layers side by side, padded to the largest rank; where scales differ, they are in A."""
    view = linear.view
    ranks = {layer: own[LEFT].shape[0] for layer, own in parts.items()}
    scales = {layer: settings.scale(linear.modules[layer], rank) for layer, rank in ranks.items()}
    scale = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    a = np.zeros((view.stack, view.in_size, max(ranks.values())), np.float32)
    b = np.zeros((view.stack, max(ranks.values()), view.out_size), np.float32)
    for layer, own in parts.items():
        a[layer, :, : ranks[layer]] = own[LEFT].T * np.float32(scales[layer] / scale)
        b[layer, : ranks[layer]] = own[RIGHT].T
    return LowRank(a, b, scale)


def _gain(
    linear: Linear, leaf: Any, factors: LowRank, parts: Mapping[int, Mapping[str, np.ndarray]]
) -> Float[np.ndarray, "stack out"]:
    """DoRA's m / c, where c are the norms of the outputs of W + s A B."""
    gain = np.ones((linear.view.stack, linear.view.out_size), np.float32)
    for layer, own in parts.items():
        norms = factors.output_norms(linear, leaf, layer)
        gain[layer] = np.divide(own[GAIN], norms, out=np.ones_like(norms), where=norms > 0)
    return gain


def _selected(units: Float[np.ndarray, "stack size r"]) -> Int32[np.ndarray, "stack r"] | None:
    """Returns which slices a matrix of unit vectors selects; None if it is no such matrix."""
    chosen = np.argmax(units, axis=1)
    is_unit = np.all(np.count_nonzero(units, axis=1) == 1) and np.all(np.max(units, axis=1) == 1)
    is_distinct = all(np.unique(row).size == row.size for row in chosen)
    return chosen.astype(np.int32) if is_unit and is_distinct else None


def _slices(path: str, leaf: Any, linear: Linear, axis: str, chosen: np.ndarray, changes: np.ndarray) -> SliceDelta:
    order = np.argsort(chosen, axis=1)
    slices = np.take_along_axis(chosen, order, axis=1)
    changes = np.take_along_axis(changes, order[:, :, None], axis=1)
    indices = slice_indices(linear.view, axis, slices)
    old = gather_bits(leaf, indices.reshape(-1)).reshape(indices.shape)
    return slice_delta(leaf, linear.view, axis, slices, old ^ added_bits(path, old, leaf.dtype, changes))
