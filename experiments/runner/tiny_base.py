"""The model of the tiny scale: a LLaMA of a quarter of a million weights, pre-trained here on text and instructions.

A model of random weights has nothing that fine-tuning could lose or build on. This one has read Shakespeare, science
questions and three of NumGLUE's six task types; the other types are what experiments fine-tune it on.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tokenizers

from experiments.runner.texts import general_text
from jaxsparse.common.progress import progress
from jaxsparse.data.batches import Batch
from jaxsparse.data.examples import encode_rows
from jaxsparse.data.rows import Row
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.evaluate.suites import load_task
from jaxsparse.models.checkpoints import save
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.functional import LanguageModel

__all__ = ["PRETRAINING_TASKS", "make_tiny_base"]

PRETRAINING_TASKS = ("numglue/type3", "numglue/type4", "numglue/type8", "commonsense/ARC-Easy")
"""What the model has seen before any experiment. At tiny scale one fine-tunes on a part of it: neuroada/tasks, on
Commonsense15K, which holds ARC-Easy."""

_VOCABULARY, _LENGTH, _BATCH, _RATE = 1024, 128, 16, 3e-3


def make_tiny_base(folder: Path, data_root: Path, *, steps: int = 1200) -> Path:
    """Pre-trains the model of the tiny scale, in two minutes on two cores, and saves it with its tokenizer.

    Args:
        folder: where it is to lie; one that lies there is kept.
        data_root: where the data lie, see `jaxsparse.evaluate.suites`.
        steps: optimizer steps.

    Returns:
        The folder.

    Raises:
        InputError: the data are not there.
    """
    if (folder / "metadata.json").exists():
        return folder
    rows = [row for task in PRETRAINING_TASKS for row in load_task(data_root, task).train]
    text = general_text(data_root).train
    tokenizer = _tokenizer([text, *(_written(row) for row in rows)])
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = LanguageModel(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(_RATE, steps)))
    params = model.init(jax.random.key(0))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, Any]:
        (loss, _), gradients = jax.value_and_grad(model.loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    stream = _stream(tokenizer, text, rows)
    generator = np.random.default_rng(0)
    with progress("pre-training the tiny model", steps) as advance:
        for number in range(steps):
            params, state, loss = step(params, state, _windows(stream, generator))
            advance(1, f"loss {float(loss):.3f}" if number % 20 == 0 else "")
    save(folder, config, params, tokenizer, "tiny-base")
    return folder


def _written(row: Row) -> str:
    """A row as the model reads it."""
    return f"{row.instruction}\n{row.input}\n{row.answer}"


def _tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE: no text is unknown to it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eos_id=0, stop_ids=(0,))


def _stream(tokenizer: Tokenizer, text: str, rows: Sequence[Row]) -> np.ndarray:
    """All documents one after the other: every row as it is fine-tuned on later, and paragraphs of the text."""
    examples = encode_rows(rows, tokenizer, max_length=512, too_long="drop")
    documents = [list(example.prompt_ids + example.answer_ids) for example in examples]
    lines = text.split("\n\n")
    paragraphs = ["\n\n".join(lines[at : at + 4]) for at in range(0, len(lines), 4)]
    documents += [[*tokenizer.encode(paragraph, add_bos=False), 0] for paragraph in paragraphs]
    order = np.random.default_rng(1).permutation(len(documents))
    return np.array(list(itertools.chain.from_iterable(documents[at] for at in order)), np.int32)


def _windows(stream: np.ndarray, generator: np.random.Generator) -> Batch:
    """A batch of windows of the stream, every token of them a target."""
    starts = generator.integers(0, len(stream) - _LENGTH - 1, _BATCH)
    ids = np.stack([stream[start : start + _LENGTH + 1] for start in starts])
    shape = (_BATCH, _LENGTH)
    positions = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), shape)
    return Batch(ids[:, :-1], ids[:, 1:], np.ones(shape, np.float32), positions, np.ones(shape, np.int32))
