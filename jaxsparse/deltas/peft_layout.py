"""How PEFT's LoRA adapters name and shape what they hold: the linear modules of a model, files, keys, settings."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsparse.models.configs import Config
from jaxsparse.models.layouts import parameters_of, tensor_name
from jaxsparse.subspaces.targets import MatrixView, matrix_view

__all__ = ["CONFIG", "GAIN", "LEFT", "PREFIX", "RIGHT", "WEIGHTS", "Linear", "LowRank", "linears", "pattern_value"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the model."""
LEFT, RIGHT, GAIN = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
"""What PEFT puts behind it: A is (r, in), B (out, r), DoRA's magnitudes (out,), whatever the layout of the weight."""


class Linear(NamedTuple):
    """A linear module of a model, of all its layers.

    Attributes:
        view: how its weight is read as (in, out) matrices.
        modules: Hugging Face's names, one for each layer.
        suffix: what these end with and no other linear module does.
    """

    view: MatrixView
    modules: tuple[str, ...]
    suffix: str


class LowRank(NamedTuple):
    """s A B of all layers of one linear module, and a factor for every output or None.

    Attributes:
        a: A.
        b: B.
        scale: s.
        gain: g.
    """

    a: Float[np.ndarray, "stack in r"]
    b: Float[np.ndarray, "stack r out"]
    scale: float
    gain: Float[np.ndarray, "stack out"] | None = None

    def output_norms(self, linear: Linear, leaf: Any, layer: int) -> Float[np.ndarray, " out"]:
        """Returns the norms of the outputs of W + s A B of one layer, by which DoRA divides."""
        weight = np.asarray(leaf[layer] if linear.view.layer_axes else leaf).astype(np.float64)
        return np.linalg.norm(weight + self.scale * (self.a[layer].astype(np.float64) @ self.b[layer]), axis=0)


def linears(config: Config) -> dict[str, Linear]:
    """Returns the linear modules of a model by the path of their weight.

    Args:
        config: the model's configuration.

    Example:
        >>> from jaxsparse.models.presets import PRESETS
        >>> linears(PRESETS["llama2-7b"])["layers/mlp/up_proj/kernel"].suffix
        'mlp.up_proj'
    """
    found = {}
    for parameter in parameters_of(config):
        if parameter.path.endswith("/kernel"):
            axes = ((0,), (1,), (2,)) if parameter.stacked else ((), (0,), (1,))
            names = (tensor_name(config, parameter.path, layer) for layer in parameter.layers)
            modules = tuple(name.removesuffix(".weight") for name in names)
            suffix = parameter.path.removeprefix("layers/").removesuffix("/kernel").replace("/", ".")
            found[parameter.path] = Linear(matrix_view(parameter.shape, *axes), modules, suffix)
    return found


def pattern_value(pattern: Mapping[str, int | float], module: str, otherwise: int | float) -> int | float:
    """Returns what a rank_pattern or alpha_pattern says of a module: the first key that is its name or an end of it.

    Args:
        pattern: by names or ends of names; a key that begins with ^ is a whole name.
        module: Hugging Face's name.
        otherwise: what holds if there is none.

    Example:
        >>> pattern_value({"up_proj": 4}, "model.layers.0.mlp.up_proj", 8)
        4
    """
    for key, value in pattern.items():
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}")):
            return value
    return otherwise
