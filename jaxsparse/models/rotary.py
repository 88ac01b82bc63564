"""Rotary position embeddings in the rotate-half layout of Hugging Face, computed in float32."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsparse.models.configs import LlamaConfig, RopeScaling

__all__ = ["angles", "frequencies", "rotate"]


def frequencies(config: LlamaConfig) -> Float[np.ndarray, " half_head_dim"]:
    """Returns the angle per position of every pair of a head's coordinates.

    Args:
        config: gives head_dim, rope_theta and rope_scaling.

    Returns:
        The frequencies in radians per position, float32, highest first.

    Example:
        >>> frequencies(
        ...     LlamaConfig(
        ...         vocab_size=9,
        ...         hidden_size=8,
        ...         intermediate_size=9,
        ...         num_layers=1,
        ...         num_heads=2,
        ...         num_kv_heads=1,
        ...         head_dim=4,
        ...     )
        ... ).tolist()
        [1.0, 0.009999999776482582]
    """
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain.astype(np.float32)
    stretched = plain / scaling.factor
    if scaling.kind == "llama3":
        kept = _kept_share(plain, scaling)
        stretched = kept * plain + (1 - kept) * stretched
    return stretched.astype(np.float32)


def _kept_share(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns how much of each frequency LLaMA 3 keeps: 1 for short wavelengths, 0 for long ones."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def angles(
    positions: Int[Array, "batch length"], frequencies: Float[np.ndarray, " half_head_dim"]
) -> tuple[Float[Array, "batch length 1 half_head_dim"], Float[Array, "batch length 1 half_head_dim"]]:
    """Returns the cosines and sines that `rotate` wants.

    Args:
        positions: position of every token in its sequence.
        frequencies: from `frequencies`.

    Returns:
        Cosines and sines, float32, with an axis of one for the heads.
    """
    radians = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(radians), jnp.sin(radians)


def rotate(
    heads: Float[Array, "batch length heads head_dim"], cosine: Float[Array, "..."], sine: Float[Array, "..."]
) -> Float[Array, "batch length heads head_dim"]:
    """Turns each pair of coordinates, i and i + head_dim / 2, by its position's angle.

    Args:
        heads: queries or keys.
        cosine: from `angles`; its batch may be 1.
        sine: likewise.

    Returns:
        The turned heads, in the dtype given.
    """
    first, second = jnp.split(heads, 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(heads.dtype)
