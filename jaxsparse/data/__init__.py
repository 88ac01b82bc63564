"""Data: instruction rows, prompts, tokenizers, examples and batches."""

from jaxsparse.data.arithmetic import generate_problems
from jaxsparse.data.batches import Batch, batches, default_buckets, evaluation_batches, steps_per_epoch
from jaxsparse.data.examples import Example, encode_prompt, encode_rows
from jaxsparse.data.prompts import Prompt, TokenizerLike, answer_text, render_prompt
from jaxsparse.data.rows import Row, load_rows

__all__ = [
    "Batch",
    "Example",
    "Prompt",
    "Row",
    "TokenizerLike",
    "answer_text",
    "batches",
    "default_buckets",
    "encode_prompt",
    "encode_rows",
    "evaluation_batches",
    "generate_problems",
    "load_rows",
    "render_prompt",
    "steps_per_epoch",
]
