"""GGUF files in: LLaMA-type models, any quantisation that the `gguf` library can undo."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.data.tokenizer_formats import tokenizer_from_gguf
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.configs import LlamaConfig, RopeScaling
from jaxsparse.models.layouts import Parameter, parameters_of
from jaxsparse.models.rotary import frequencies
from jaxsparse.models.sources import TensorSpec

__all__ = ["GGUFSource"]

# What GGUF calls the modules of a LLaMA.
_NAMES = {
    "embed_tokens": "token_embd",
    "layers/input_layernorm": "blk.{}.attn_norm",
    "layers/self_attn/q_proj": "blk.{}.attn_q",
    "layers/self_attn/k_proj": "blk.{}.attn_k",
    "layers/self_attn/v_proj": "blk.{}.attn_v",
    "layers/self_attn/o_proj": "blk.{}.attn_output",
    "layers/post_attention_layernorm": "blk.{}.ffn_norm",
    "layers/mlp/gate_proj": "blk.{}.ffn_gate",
    "layers/mlp/up_proj": "blk.{}.ffn_up",
    "layers/mlp/down_proj": "blk.{}.ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}

_Type = gguf.GGMLQuantizationType
_PLAIN = {_Type.F32: "float32", _Type.F16: "float16", _Type.BF16: "bfloat16"}

# What LLaMA 3.1's frequencies are divided by.
_ROPE_FREQUENCIES = "rope_freqs.weight"


class GGUFSource:
    """A .gguf file: configuration, tokenizer and tensors, float32 once dequantised (float16, bfloat16 as they are).

    Args:
        path: the file.

    Raises:
        InputError: the file is truncated or no GGUF, or its architecture or quantisation is not supported.
    """

    interleaved = True

    def __init__(self, path: str | Path):
        self.where = str(path)
        self.name = Path(path).stem
        try:
            # The library maps the file; only the header's pages are touched here.
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError, TypeError) as error:
            raise InputError(f"{path} is not a GGUF file, or truncated: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != _ROPE_FREQUENCIES}
        self._rope_frequencies = next((t.data for t in reader.tensors if t.name == _ROPE_FREQUENCIES), None)
        self.tensors = {
            name: TensorSpec(tuple(tensor.shape[::-1].tolist()), self._dtype(tensor))
            for name, tensor in self._tensors.items()
        }
        self.config = self._with_rope_frequencies(self._config())
        self.parameters = parameters_of(self.config)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that the file describes."""
        return tokenizer_from_gguf(self.metadata)

    def name_of(self, parameter: Parameter, layer: int) -> str:
        """Returns GGUF's name of one layer's tensor."""
        module, leaf = parameter.path.rsplit("/", 1)
        return f"{_NAMES[module].format(layer)}.{'bias' if leaf == 'bias' else 'weight'}"

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to `stop`, dequantised."""
        tensor = self._tensors[name]
        row_bytes = tensor.n_bytes // int(tensor.shape[-1])
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        rows = np.fromfile(
            self.where, np.uint8, (stop - start) * row_bytes, offset=tensor.data_offset + start * row_bytes
        ).reshape(stop - start, row_bytes)
        shape = (stop - start, *tensor.shape[:-1][::-1].tolist())
        if tensor.tensor_type in _PLAIN:
            return rows.view(jnp.dtype(_PLAIN[tensor.tensor_type])).reshape(shape)
        return gguf.quants.dequantize(rows, tensor.tensor_type).reshape(shape)

    def _config(self) -> LlamaConfig:
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise InputError(f"{self.where}: architecture {architecture!r} is not supported; supported: 'llama'")
        if self._optional("expert_count", 0):
            raise InputError(f"{self.where}: mixtures of experts are not supported")
        heads = self._required("attention.head_count")
        width = self._required("embedding_length")
        return LlamaConfig(
            vocab_size=self._vocab_size(),
            hidden_size=width,
            intermediate_size=self._required("feed_forward_length"),
            num_layers=self._required("block_count"),
            num_heads=heads,
            num_kv_heads=self._optional("attention.head_count_kv", heads),
            head_dim=self._optional("attention.key_length", width // heads),
            rope_theta=_shortest(self._optional("rope.freq_base", 1e4)),
            rope_scaling=self._rope_scaling(),
            rms_norm_eps=_shortest(self._required("attention.layer_norm_rms_epsilon")),
            tie_word_embeddings="output.weight" not in self.tensors,
            attention_bias="blk.0.attn_q.bias" in self.tensors,
            mlp_bias="blk.0.ffn_up.bias" in self.tensors,
            max_position_embeddings=self._required("context_length"),
            sliding_window=self._optional("attention.sliding_window", None),
        )

    def _vocab_size(self) -> int:
        if "token_embd.weight" not in self.tensors:
            raise InputError(f"{self.where}: tensor token_embd.weight is missing")
        return self.tensors["token_embd.weight"].shape[0]

    def _rope_scaling(self) -> RopeScaling | None:
        kind = self._optional("rope.scaling.type", "none")
        if kind == "linear":
            return RopeScaling("linear", _shortest(self._required("rope.scaling.factor")))
        if kind != "none":
            raise InputError(f"{self.where}: RoPE scaling {kind!r} is not supported; supported: 'linear'")
        return None

    def _with_rope_frequencies(self, config: LlamaConfig) -> LlamaConfig:
        """Returns the configuration with the scaling that stands in the file as a tensor of divisors."""
        if self._rope_frequencies is None:
            return config
        # Every LLaMA since 3.1 has these constants; the largest divisor is the factor.
        scaling = RopeScaling("llama3", float(self._rope_frequencies.max()), 1.0, 4.0, 8192)
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        if not np.allclose(frequencies(config) / self._rope_frequencies, frequencies(scaled), rtol=1e-5):
            raise InputError(f"{self.where}: {_ROPE_FREQUENCIES} is not the RoPE scaling of any LLaMA known here")
        return scaled

    def _optional(self, key: str, default: Any) -> Any:
        return self.metadata.get(f"llama.{key}", default)

    def _required(self, key: str) -> Any:
        if f"llama.{key}" not in self.metadata:
            raise InputError(f"{self.where}: the metadata has no llama.{key}")
        return self.metadata[f"llama.{key}"]

    def _dtype(self, tensor: Any) -> str:
        kind = tensor.tensor_type
        if kind in _PLAIN:
            return _PLAIN[kind]
        probe = np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8)
        try:
            gguf.quants.dequantize(probe, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.where}: tensor {tensor.name} is quantised as {kind.name}, which is not supported"
            ) from error
        return "float32"


def _shortest(value: float) -> float:
    """Returns the decimal number that was meant by a float32, as 1e-5 by 9.99999974e-06."""
    return float(str(np.float32(value)))
