"""`jaxsparse evaluate`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from jaxsparse import deltas
from jaxsparse.cli.arguments import parse
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text
from jaxsparse.common.progress import progress
from jaxsparse.data.rows import load_rows
from jaxsparse.evaluate.held_out import measure
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel

__all__ = ["EvaluateConfig", "main"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures loss, perplexity and exact match of a model on instruction rows.

    The loss is the mean cross-entropy of the right answers' tokens; exact match compares greedily generated answers
    with the right ones. With --delta the model is the base with that delta applied.

    Example: jaxsparse evaluate --model smollm2-135m --delta runs/first/delta --data test.json
    """

    model: str
    """A folder (ours or Hugging Face's), a .gguf or llama2.c file, or a known name such as smollm2-135m."""
    data: Path
    """Instruction rows: .json or .jsonl, .gz too."""
    delta: Path | None = None
    """A delta to apply first."""
    rows: int | None = None
    """Measure on so many of the first rows only."""
    batch: int = 16
    """Rows at a time."""
    max_length: int = 512
    """Longest prompt and answer together, in tokens."""
    max_new_tokens: int = 24
    """Longest generated answer, in tokens."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How a row becomes a prompt; auto: the tokenizer's chat template where it has one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights; a delta belongs to one dtype."""
    predictions: Path | None = None
    """Write every prediction to this JSON file."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments, measures, and prints the result."""
    config = parse(lambda given: EvaluateConfig, "jaxsparse evaluate", arguments)
    rows = load_rows(config.data)[: config.rows]
    checkpoint = load(config.model, dtype=config.dtype)
    if checkpoint.tokenizer is None:
        raise InputError(f"model {checkpoint.name} has no tokenizer; add its tokenizer.json to {checkpoint.folder}")
    params = checkpoint.params
    if config.delta is not None:
        delta = deltas.load(config.delta, base_fingerprint=checkpoint.fingerprint)
        params = deltas.apply(params, delta, donate=True)
    options = {name: getattr(config, name) for name in ("batch", "max_length", "max_new_tokens", "template")}
    with progress("measuring", 2 * len(rows)) as advance:
        measured = measure(
            LanguageModel(checkpoint.config),
            params,
            checkpoint.tokenizer,
            rows,
            advance=lambda units: advance(units, ""),
            **options,
        )
    result = {
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "exact_match": measured.exact_match,
        "rows": measured.rows,
    }
    if config.predictions is not None:
        written = [
            {"instruction": row.instruction, "answer": row.answer, "prediction": text}
            for row, text in zip(rows, measured.predictions, strict=True)
        ]
        atomic_write_text(config.predictions, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    if config.json:
        print(json.dumps(result))
        return 0
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    Console().print(table)
    return 0
