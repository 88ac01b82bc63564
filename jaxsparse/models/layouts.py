"""The parameters of each model family: path, shape, and how other people's files hold them."""

import dataclasses
from typing import Any

from jaxsparse.models.configs import Config, GPT2Config, LlamaConfig

__all__ = ["Parameter", "parameters_of", "tensor_name"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor of a parameter tree.

    Attributes:
        path: its path, as `layers/self_attn/q_proj/kernel`; layers are stacked on axis 0.
        shape: its shape.
        stacked: axis 0 counts layers, which files hold one by one.
        transposed: files hold a layer's kernel as (out, in); ours are (in, out).
        rotary_heads: the number of heads where its outputs are rotated, else 0. GGUF and llama2.c
            interleave the two halves of each such head.
    """

    path: str
    shape: tuple[int, ...]
    stacked: bool = False
    transposed: bool = False
    rotary_heads: int = 0

    @property
    def layers(self) -> range:
        """The layers' numbers; just 0 for a parameter that is not stacked."""
        return range(self.shape[0] if self.stacked else 1)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of one layer's tensor in the files."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def as_held(self) -> "Parameter":
        """Returns the parameter for files that hold it just as the tree does."""
        return Parameter(self.path, self.shape)


def parameters_of(config: Config) -> list[Parameter]:
    """Returns every parameter of a model, in the order of the network.

    Args:
        config: the model's configuration.

    Returns:
        The parameters.
    """
    return _llama(config) if isinstance(config, LlamaConfig) else _gpt2(config)


def tensor_name(config: Config, path: str, layer: int) -> str:
    """Returns Hugging Face's name of one layer's tensor.

    Args:
        config: the model's configuration.
        path: of our parameter.
        layer: the layer's number; of no matter where layers are not stacked.

    Example:
        >>> from jaxsparse.models.presets import PRESETS
        >>> tensor_name(PRESETS["llama2-7b"], "layers/mlp/up_proj/kernel", 3)
        'model.layers.3.mlp.up_proj.weight'
    """
    base, layers = ("model", "layers") if isinstance(config, LlamaConfig) else ("transformer", "h")
    module, leaf = path.replace("/", ".").rsplit(".", 1)
    leaf = "bias" if leaf == "bias" else "weight"
    if module == "lm_head":
        return f"{module}.{leaf}"
    return f"{base}.{module.replace('layers.', f'{layers}.{layer}.', 1)}.{leaf}"


def _llama(config: LlamaConfig) -> list[Parameter]:
    layers, width, inner = config.num_layers, config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def layer(name: str, *shape: int, **how: Any) -> Parameter:
        return Parameter(f"layers/{name}", (layers, *shape), stacked=True, **how)

    def linear(name: str, in_: int, out: int, bias: bool, heads: int = 0) -> list[Parameter]:
        kernel = layer(f"{name}/kernel", in_, out, transposed=True, rotary_heads=heads)
        return [kernel, layer(f"{name}/bias", out, rotary_heads=heads)] if bias else [kernel]

    attention, mlp = config.attention_bias, config.mlp_bias
    return [
        Parameter("embed_tokens/embedding", (config.vocab_size, width)),
        layer("input_layernorm/scale", width),
        *linear("self_attn/q_proj", width, queries, attention, config.num_heads),
        *linear("self_attn/k_proj", width, keys, attention, config.num_kv_heads),
        *linear("self_attn/v_proj", width, keys, attention),
        *linear("self_attn/o_proj", queries, width, attention),
        layer("post_attention_layernorm/scale", width),
        *linear("mlp/gate_proj", width, inner, mlp),
        *linear("mlp/up_proj", width, inner, mlp),
        *linear("mlp/down_proj", inner, width, mlp),
        Parameter("norm/scale", (width,)),
        *_head(config),
    ]


def _gpt2(config: GPT2Config) -> list[Parameter]:
    layers, width, inner = config.num_layers, config.hidden_size, config.intermediate_size

    def layer(name: str, *shape: int) -> Parameter:
        return Parameter(f"layers/{name}", (layers, *shape), stacked=True)

    def norm(name: str) -> list[Parameter]:
        return [layer(f"{name}/scale", width), layer(f"{name}/bias", width)]

    def linear(name: str, in_: int, out: int) -> list[Parameter]:
        # Hugging Face's Conv1D is (in, out), as ours.
        return [layer(f"{name}/kernel", in_, out), layer(f"{name}/bias", out)]

    return [
        Parameter("wte/embedding", (config.vocab_size, width)),
        Parameter("wpe/embedding", (config.max_position_embeddings, width)),
        *norm("ln_1"),
        *linear("attn/c_attn", width, 3 * width),
        *linear("attn/c_proj", width, width),
        *norm("ln_2"),
        *linear("mlp/c_fc", width, inner),
        *linear("mlp/c_proj", inner, width),
        Parameter("ln_f/scale", (width,)),
        Parameter("ln_f/bias", (width,)),
        *_head(config),
    ]


def _head(config: Config) -> list[Parameter]:
    if config.tie_word_embeddings:
        return []
    return [Parameter("lm_head/kernel", (config.hidden_size, config.vocab_size), transposed=True)]
