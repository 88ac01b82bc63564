"""Configurations of well-known models by name: their shapes, without weights."""

from functools import partial
from typing import Any

from jaxsparse.models.configs import Config, GPT2Config, LlamaConfig

__all__ = ["PRESETS"]

# The models' own config.json files; rope scaling of Llama 3.1 and later is left to those files.
_llama_1 = partial(LlamaConfig, vocab_size=32000, head_dim=128, rms_norm_eps=1e-6)
_llama_2 = partial(LlamaConfig, vocab_size=32000, head_dim=128, max_position_embeddings=4096)
_llama_3 = partial(
    LlamaConfig, vocab_size=128256, head_dim=128, num_kv_heads=8, rope_theta=5e5, max_position_embeddings=8192
)
_smollm2 = partial(
    LlamaConfig, vocab_size=49152, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192, rope_theta=1e5
)
_gpt2 = partial(GPT2Config, vocab_size=50257)


def _sizes(hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
    }


_SEVEN, _EIGHT = _sizes(4096, 11008, 32, 32), _sizes(4096, 14336, 32, 32)
_THIRTEEN, _SEVENTY = _sizes(5120, 13824, 40, 40), _sizes(8192, 28672, 80, 64)

PRESETS: dict[str, Config] = {
    "llama-7b": _llama_1(**_SEVEN, num_kv_heads=32),
    "llama-13b": _llama_1(**_THIRTEEN, num_kv_heads=40),
    "llama2-7b": _llama_2(**_SEVEN, num_kv_heads=32),
    "llama2-13b": _llama_2(**_THIRTEEN, num_kv_heads=40),
    "llama2-70b": _llama_2(**_SEVENTY, num_kv_heads=8),
    "llama3-8b": _llama_3(**_EIGHT),
    "llama3-70b": _llama_3(**_SEVENTY),
    "mistral-7b": LlamaConfig(
        **_EIGHT, vocab_size=32000, head_dim=128, num_kv_heads=8, max_position_embeddings=32768, sliding_window=4096
    ),
    "tinyllama-1.1b": LlamaConfig(**_sizes(2048, 5632, 22, 32), vocab_size=32000, num_kv_heads=4, head_dim=64),
    "smollm2-135m": _smollm2(**_sizes(576, 1536, 30, 9), num_kv_heads=3),
    "smollm2-360m": _smollm2(**_sizes(960, 2560, 32, 15), num_kv_heads=5),
    "gpt2": _gpt2(**_sizes(768, 3072, 12, 12)),
    "gpt2-medium": _gpt2(**_sizes(1024, 4096, 24, 16)),
    "gpt2-large": _gpt2(**_sizes(1280, 5120, 36, 20)),
    "gpt2-xl": _gpt2(**_sizes(1600, 6400, 48, 25)),
}
"""By name, lower case."""
