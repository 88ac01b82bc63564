"""A small model on disk."""

import pytest

from jaxsparse.data.tokenizer_formats import tokenizer_from_gguf
from jaxsparse.models import checkpoints
from tests.models.formats import byte_level_metadata
from tests.models.stored import CONFIG, checkpoint_of


@pytest.fixture
def tokenizer():
    return tokenizer_from_gguf(byte_level_metadata(["Ġ t", "h e"]))


@pytest.fixture
def stored(rng, tmp_path, tokenizer):
    """A small model in our own format."""
    made = checkpoint_of(CONFIG, rng, tokenizer=tokenizer)
    return checkpoints.save(tmp_path / "stored", CONFIG, made.params, tokenizer, "small")


@pytest.fixture
def exported(stored, tmp_path):
    """The same model as Hugging Face lays it out, in several shards."""
    return checkpoints.export_hugging_face(tmp_path / "exported", stored, max_shard_size=20_000)
