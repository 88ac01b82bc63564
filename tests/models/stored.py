"""A small model in every format, and what it is compared by."""

import dataclasses

import jax

from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.models import checkpoints
from jaxsparse.models.functional import LanguageModel
from tests.models.formats import byte_level_metadata
from tests.models.small import LLAMA, random_params

METADATA = byte_level_metadata(["h e"])
CONFIG = dataclasses.replace(LLAMA, vocab_size=300, tie_word_embeddings=True)


def assert_same(found, expected) -> None:
    """Trees of the same structure, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert fingerprint(found) == fingerprint(expected)


def checkpoint_of(config, rng, dtype="float32", tokenizer=None) -> checkpoints.Checkpoint:
    params = random_params(LanguageModel(config), rng, dtype)
    return checkpoints.Checkpoint(config, params, tokenizer, "small", fingerprint(params))
