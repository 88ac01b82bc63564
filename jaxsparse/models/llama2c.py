"""Models of llama2.c: its legacy layout, seven int32 and then float32 weights."""

import math
from pathlib import Path

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.data.tokenizer_formats import tokenizer_from_llama2c
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.layouts import Parameter, parameters_of
from jaxsparse.models.sources import TensorSpec

__all__ = ["Llama2cSource"]

_HEADER_BYTES = 7 * 4

# The order of the weights; the tables of rotary cosines and sines after the last norm are not needed.
_ORDER = (
    "embed_tokens/embedding",
    "layers/input_layernorm/scale",
    "layers/self_attn/q_proj/kernel",
    "layers/self_attn/k_proj/kernel",
    "layers/self_attn/v_proj/kernel",
    "layers/self_attn/o_proj/kernel",
    "layers/post_attention_layernorm/scale",
    "layers/mlp/gate_proj/kernel",
    "layers/mlp/down_proj/kernel",
    "layers/mlp/up_proj/kernel",
    "norm/scale",
    "rotary tables",
    "lm_head/kernel",
)


class Llama2cSource:
    """A .bin file of llama2.c, float32.

    Args:
        path: the file.

    Raises:
        InputError: the file is truncated, or of another kind.
    """

    interleaved = True

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.where = str(path)
        self.name = self.path.stem
        self.config = _config(self.path)
        self.parameters = parameters_of(self.config)
        sizes = {p.path: math.prod(p.shape) for p in self.parameters}
        sizes["rotary tables"] = self.config.max_position_embeddings * self.config.head_dim
        self._offsets: dict[str, int] = {}
        end = _HEADER_BYTES
        for name in _ORDER:
            self._offsets[name] = end
            end += 4 * sizes.get(name, 0)
        size = self.path.stat().st_size
        if size != end:
            raise InputError(
                f"{path} is not a legacy llama2.c model, or truncated: "
                f"its header stands for {end} bytes, the file has {size}"
            )
        self.tensors: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        for parameter in self.parameters:
            for layer in parameter.layers:
                name = self.name_of(parameter, layer)
                self.tensors[name] = TensorSpec(parameter.file_shape, "float32")
                self._starts[name] = self._offsets[parameter.path] + 4 * layer * math.prod(parameter.file_shape)

    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer beside the file: tok<vocabulary>.bin, tokenizer.bin or the only tok*.bin."""
        folder = self.path.parent
        named = [folder / f"tok{self.config.vocab_size}.bin", folder / "tokenizer.bin"]
        found = [path for path in named if path.is_file()] or sorted(folder.glob("tok*.bin"))
        return tokenizer_from_llama2c(found[0]) if found else None

    def name_of(self, parameter: Parameter, layer: int) -> str:
        """Returns a name for one layer's tensor; the file itself has none."""
        return f"{parameter.path}[{layer}]" if parameter.stacked else parameter.path

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to `stop`."""
        _, *rest = self.tensors[name].shape
        row = math.prod(rest)
        offset = self._starts[name] + 4 * start * row
        return np.fromfile(self.path, "<f4", (stop - start) * row, offset=offset).reshape(stop - start, *rest)


def _config(path: Path) -> LlamaConfig:
    header = np.fromfile(path, "<i4", 7).tolist()
    try:
        width, inner, layers, heads, kv_heads, vocabulary, length = header
        if min(width, inner, layers, heads, kv_heads, length) < 1 or width % heads:
            raise ValueError(f"its header is {header}")
        return LlamaConfig(
            vocab_size=abs(vocabulary),
            hidden_size=width,
            intermediate_size=inner,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width // heads,
            tie_word_embeddings=vocabulary > 0,  # run.c: a negative vocabulary announces a head of its own
            max_position_embeddings=length,
        )
    except ValueError as error:
        raise InputError(f"{path} is not a legacy llama2.c model, or truncated: {error}") from error
