"""Writers of other people's formats, written apart from the readers they test."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxsparse.models.configs import LlamaConfig

# GGUF's names, and llama2.c's order, of the tensors of a layer.
_LAYER_NAMES = {
    "input_layernorm/scale": "attn_norm",
    "self_attn/q_proj/kernel": "attn_q",
    "self_attn/k_proj/kernel": "attn_k",
    "self_attn/v_proj/kernel": "attn_v",
    "self_attn/o_proj/kernel": "attn_output",
    "post_attention_layernorm/scale": "ffn_norm",
    "mlp/gate_proj/kernel": "ffn_gate",
    "mlp/down_proj/kernel": "ffn_down",
    "mlp/up_proj/kernel": "ffn_up",
}


def leaf(params: dict[str, Any], path: str) -> np.ndarray:
    for key in path.split("/"):
        params = params[key]
    return np.asarray(params)


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of llama.cpp's converter, from rotate-half to interleaved RoPE; weight is (out, ...)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def layer_tensor(config: LlamaConfig, params: dict[str, Any], name: str, layer: int) -> np.ndarray:
    """One layer's tensor as (out, in), ready for interleaved RoPE."""
    tensor = leaf(params["layers"], name)[layer]
    if name.endswith("kernel"):
        tensor = tensor.T
    heads = {"q": config.num_heads, "k": config.num_kv_heads}.get(name.removeprefix("self_attn/")[0], 0)
    rotated = name.startswith(("self_attn/q_proj", "self_attn/k_proj"))
    return np.ascontiguousarray(interleaved(tensor, heads) if rotated else tensor)


def write_llama2c(path: Path, config: LlamaConfig, params: dict[str, Any]) -> None:
    """llama2.c's legacy export."""
    vocabulary = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
    with path.open("wb") as file:
        file.write(
            struct.pack(
                "<7i",
                config.hidden_size,
                config.intermediate_size,
                config.num_layers,
                config.num_heads,
                config.num_kv_heads,
                vocabulary,
                config.max_position_embeddings,
            )
        )
        file.write(leaf(params, "embed_tokens/embedding").tobytes())
        for name in _LAYER_NAMES:
            for layer in range(config.num_layers):
                file.write(layer_tensor(config, params, name, layer).tobytes())
        file.write(leaf(params, "norm/scale").tobytes())
        file.write(np.full(config.max_position_embeddings * config.head_dim, 7.0, np.float32).tobytes())
        if not config.tie_word_embeddings:
            file.write(np.ascontiguousarray(leaf(params, "lm_head/kernel").T).tobytes())


def write_gguf(
    path: Path,
    config: LlamaConfig,
    params: dict[str, Any],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
) -> None:
    """A GGUF file with matrices of the given kind and float32 norms."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in (metadata or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)

    def add_tensor(name: str, tensor: np.ndarray) -> None:
        plain = kind == gguf.GGMLQuantizationType.F32 or tensor.ndim == 1
        data = tensor.astype(np.float32) if plain else gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=None if plain else kind)

    add_tensor("token_embd.weight", leaf(params, "embed_tokens/embedding"))
    for layer in range(config.num_layers):
        for name, theirs in _LAYER_NAMES.items():
            add_tensor(f"blk.{layer}.{theirs}.weight", layer_tensor(config, params, name, layer))
    add_tensor("output_norm.weight", leaf(params, "norm/scale"))
    if not config.tie_word_embeddings:
        add_tensor("output.weight", np.ascontiguousarray(leaf(params, "lm_head/kernel").T))
    for name, tensor in (extra or {}).items():
        add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama2c_tokenizer(path: Path, pieces: list[str], scores: list[float]) -> None:
    """A tok*.bin: the 3 special tokens, 256 bytes, then the given pieces."""
    first = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    with path.open("wb") as file:
        file.write(struct.pack("<i", 16))
        for piece, score in zip([*first, *pieces], [0.0] * 259 + scores, strict=True):
            data = piece.encode()
            file.write(struct.pack("<fi", score, len(data)) + data)


def byte_level_metadata(merges: list[str], **more: Any) -> dict[str, Any]:
    """GGUF's description of a byte-level BPE tokenizer: 3 special tokens, 256 bytes, then the merges' results."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *(m.replace(" ", "") for m in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **more,
    }
