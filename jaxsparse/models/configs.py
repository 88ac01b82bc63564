"""Shapes and constants of the model families, and their spelling in Hugging Face's config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from jaxsparse.common.errors import InputError

__all__ = [
    "Config",
    "GPT2Config",
    "LlamaConfig",
    "RopeScaling",
    "config_from_hugging_face",
    "config_from_json",
    "config_to_hugging_face",
]


def _require_positive(config: Any, *names: str) -> None:
    """Raises unless the named fields are integers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{type(config).__name__}: {name} must be a positive integer, not {value!r}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pre-training ones.

    Attributes:
        kind: `linear` divides every frequency by the factor (DeepSeek-Coder); `llama3` divides the low ones,
            keeps the high ones and blends between (LLaMA 3.1 and later).
        factor: by how much the context grew.
        low_freq_factor: llama3 only: wavelengths above original_max_position_embeddings / this are divided.
        high_freq_factor: llama3 only: wavelengths below original_max_position_embeddings / this are kept.
        original_max_position_embeddings: llama3 only: the context length of pre-training.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise InputError(f"RoPE scaling {self.kind!r} is not supported; supported: 'linear', 'llama3'")
        if self.factor <= 0:
            raise InputError(f"RopeScaling: factor must be positive, not {self.factor}")
        if self.kind == "llama3":
            _require_positive(self, "original_max_position_embeddings")
            if not 0 < self.low_freq_factor < self.high_freq_factor:
                raise InputError(
                    "RopeScaling: llama3 needs 0 < low_freq_factor < high_freq_factor, "
                    f"not {self.low_freq_factor} and {self.high_freq_factor}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder of the LLaMA family: LLaMA 1 to 3, Mistral, TinyLlama, DeepSeek-Coder, SmolLM2.

    Attributes:
        vocab_size: number of tokens V.
        hidden_size: width D of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_layers: number of layers L.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads; divides num_heads.
        head_dim: width of one head; even.
        rope_theta: base of the rotary wavelengths (RoFormer's 1e4).
        rope_scaling: how the rotary frequencies are stretched, or None.
        rms_norm_eps: added to the mean square (LLaMA 2's 1e-5).
        tie_word_embeddings: the head is the transposed embedding.
        attention_bias: biases on q, k, v and o.
        mlp_bias: biases on gate, up and down.
        max_position_embeddings: longest sequence (LLaMA 1's 2048).
        sliding_window: a token sees itself and this many minus one tokens before it; None: all of them.
        family: tells the configurations apart in JSON.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    family: Literal["llama"] = dataclasses.field(default="llama", init=False)

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _require_positive(self, "num_kv_heads", "head_dim", "max_position_embeddings")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"LlamaConfig: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"LlamaConfig: head_dim must be even for rotary embeddings, not {self.head_dim}")
        if self.sliding_window is not None:
            _require_positive(self, "sliding_window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """A decoder of the GPT-2 family.

    Attributes:
        vocab_size: number of tokens V.
        hidden_size: width D of the residual stream; a multiple of num_heads.
        intermediate_size: width of the feed-forward layer.
        num_layers: number of layers L.
        num_heads: number of heads.
        max_position_embeddings: number of learned positions (GPT-2's 1024).
        layer_norm_eps: added to the variance (GPT-2's 1e-5).
        tie_word_embeddings: the head is the transposed embedding.
        family: tells the configurations apart in JSON.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    family: Literal["gpt2"] = dataclasses.field(default="gpt2", init=False)

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _require_positive(self, "max_position_embeddings")
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"GPT2Config: hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads: as many as query heads."""
        return self.num_heads


Config: TypeAlias = LlamaConfig | GPT2Config


def config_from_json(fields: Mapping[str, Any]) -> Config:
    """Returns the configuration whose `dataclasses.asdict` was stored.

    Args:
        fields: the stored mapping.

    Returns:
        The configuration.

    Raises:
        InputError: an unknown family, or unknown, missing or inconsistent fields.

    Example:
        >>> config = GPT2Config(
        ...     vocab_size=9, hidden_size=4, intermediate_size=16, num_layers=1, num_heads=2
        ... )
        >>> config_from_json(dataclasses.asdict(config)) == config
        True
    """
    values = dict(fields)
    family = values.pop("family", None)
    types: dict[Any, type[LlamaConfig] | type[GPT2Config]] = {"llama": LlamaConfig, "gpt2": GPT2Config}
    if family not in types:
        raise InputError(f"stored configuration: family {family!r} is unknown; known: {', '.join(types)}")
    try:
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return types[family](**values)
    except TypeError as error:
        raise InputError(f"stored configuration: {error}") from error


def config_from_hugging_face(fields: Mapping[str, Any]) -> Config:
    """Reads the contents of a Hugging Face config.json.

    Missing optional fields take the defaults of `transformers`, since files leave them out.

    Args:
        fields: the parsed file; `model_type` is llama, mistral or gpt2. Rotary settings are read from
            `rope_theta` and `rope_scaling` as well as from the newer `rope_parameters`.

    Returns:
        The configuration.

    Raises:
        InputError: another model type, a missing or inconsistent shape, or a variant of the architecture
            that is not implemented.

    Example:
        >>> config_from_hugging_face(
        ...     dict(model_type="gpt2", vocab_size=9, n_embd=4, n_layer=1, n_head=2, n_positions=8)
        ... ).intermediate_size
        16
    """
    model_type = fields.get("model_type")
    if model_type in ("llama", "mistral"):
        return _llama_from_hugging_face(fields, mistral=model_type == "mistral")
    if model_type == "gpt2":
        return _gpt2_from_hugging_face(fields)
    raise InputError(f"config.json: model_type {model_type!r} is not supported; use llama, mistral or gpt2")


def _get(fields: Mapping[str, Any], name: str, type_: type = int, default: Any = None) -> Any:
    """Returns a number; without a default the file has to have it."""
    value = default if fields.get(name) is None else fields[name]
    if value is None:
        raise InputError(f"config.json: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | type_):
        raise InputError(f"config.json: {name} must be a number ({type_.__name__}), not {value!r}")
    return type_(value)


def _only(fields: Mapping[str, Any], name: str, *supported: Any) -> None:
    """Raises where a field selects a variant that is not implemented; the first value is the default."""
    value = fields.get(name, supported[0])
    if value not in supported:
        raise InputError(f"config.json: {name} {value!r} is not supported; use {supported[0]!r}")


def _llama_from_hugging_face(fields: Mapping[str, Any], mistral: bool) -> LlamaConfig:
    _only(fields, "hidden_act", "silu", "swish")
    hidden_size, num_heads = _get(fields, "hidden_size"), _get(fields, "num_attention_heads")
    if num_heads < 1 or (fields.get("head_dim") is None and hidden_size % num_heads):
        raise InputError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    max_positions = _get(fields, "max_position_embeddings", default=4096 * 32 if mistral else 2048)
    rope_theta, rope_scaling = _rope_from_hugging_face(fields, max_positions)
    # Mistral 0.1 had a window of 4096; later ones say null.
    window = fields.get("sliding_window", 4096) if mistral else None
    return LlamaConfig(
        vocab_size=_get(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_get(fields, "intermediate_size"),
        num_layers=_get(fields, "num_hidden_layers"),
        num_heads=num_heads,
        # Without the field LLaMA has as many as heads and Mistral 8; null means as many as heads in both.
        num_kv_heads=8
        if mistral and "num_key_value_heads" not in fields
        else _get(fields, "num_key_value_heads", default=num_heads),
        head_dim=_get(fields, "head_dim", default=hidden_size // num_heads),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=_get(fields, "rms_norm_eps", float, 1e-6),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        # Mistral's class has neither, whatever the file says.
        attention_bias=not mistral and bool(fields.get("attention_bias", False)),
        mlp_bias=not mistral and bool(fields.get("mlp_bias", False)),
        max_position_embeddings=max_positions,
        sliding_window=None if window is None else _get({"sliding_window": window}, "sliding_window"),
    )


def _rope_from_hugging_face(fields: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Returns the rotary base and scaling from either spelling."""
    rope = dict(fields.get("rope_scaling") or {}) | dict(fields.get("rope_parameters") or {})
    _only(rope, "partial_rotary_factor", 1.0)
    theta = _get({**fields, **rope}, "rope_theta", float, 1e4)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise InputError(f"config.json: RoPE scaling {kind!r} is not supported; supported: 'linear', 'llama3'")
    factor = _get(rope, "factor", float)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    return theta, RopeScaling(
        "llama3",
        factor,
        _get(rope, "low_freq_factor", float),
        _get(rope, "high_freq_factor", float),
        _get(rope, "original_max_position_embeddings", default=max_positions),
    )


def _gpt2_from_hugging_face(fields: Mapping[str, Any]) -> GPT2Config:
    _only(fields, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _only(fields, "scale_attn_weights", True)
    _only(fields, "scale_attn_by_inverse_layer_idx", False)
    _only(fields, "add_cross_attention", False)
    hidden_size = _get(fields, "n_embd")
    return GPT2Config(
        vocab_size=_get(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_get(fields, "n_inner", default=4 * hidden_size),
        num_layers=_get(fields, "n_layer"),
        num_heads=_get(fields, "n_head"),
        max_position_embeddings=_get(fields, "n_positions", default=1024),
        layer_norm_eps=_get(fields, "layer_norm_epsilon", float, 1e-5),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", True)),
    )


def config_to_hugging_face(config: Config) -> dict[str, Any]:
    """Returns the contents of the Hugging Face config.json that describes the same model.

    Args:
        config: a configuration; a LLaMA with a sliding window becomes model type mistral.

    Returns:
        A JSON-able mapping that `transformers` of version 4 (`rope_theta`, `rope_scaling`) and 5
        (`rope_parameters`) both read, and that `config_from_hugging_face` turns back into config.

    Raises:
        InputError: a sliding window together with biases, which no supported Hugging Face class has.

    Example:
        >>> config = GPT2Config(
        ...     vocab_size=9, hidden_size=4, intermediate_size=16, num_layers=1, num_heads=2
        ... )
        >>> config_to_hugging_face(config)["architectures"]
        ['GPT2LMHeadModel']
    """
    if isinstance(config, LlamaConfig):
        return _llama_to_hugging_face(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.layer_norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _llama_to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {name: value for name, value in dataclasses.asdict(scaling).items() if name != "kind"}
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {**rope, "type": scaling.kind},
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
    }
    if config.sliding_window is None:
        biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **fields, **biases}
    if config.attention_bias or config.mlp_bias:
        raise InputError("config.json: no Hugging Face class has a sliding window together with biases")
    window = {"sliding_window": config.sliding_window}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **fields, **window}
