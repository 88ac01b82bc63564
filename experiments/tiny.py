"""A tiny model with a tokenizer of words, for tests and for experiments that take seconds."""

from pathlib import Path
from typing import Any

import jax
import tokenizers

from jaxsparse.data.arithmetic import generate_problems
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.checkpoints import save
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.functional import LanguageModel

__all__ = ["make_tiny_model"]


def make_tiny_model(folder: Path, **options: Any) -> Path:
    """Makes a LLaMA of random weights (2 layers, grouped queries), but for options, and returns its folder."""
    texts = [row.instruction + " " + row.answer for row in generate_problems(500, split="train", seed=0)]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = Tokenizer(backend, eos_id=0, stop_ids=(0,))
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        **options,
    )
    params = LanguageModel(config).init(jax.random.key(0))
    save(folder, config, params, tokenizer, "tiny")
    return folder
