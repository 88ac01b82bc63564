"""The weights of our LLaMA that experiments adapt, where they adapt more than the attention projections."""

import jaxsparse as js

__all__ = ["LINEAR_LAYERS"]

LINEAR_LAYERS = [
    js.Target(r"layers/self_attn/._proj/kernel", stack_axes=(0,)),
    js.Target(r"layers/mlp/.*_proj/kernel", stack_axes=(0,)),
]
"""All seven linear layers of every block; layers lie stacked."""
