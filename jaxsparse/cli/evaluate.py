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
from jaxsparse.cli.delta_files import dtype_of
from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_write_text, check_writable
from jaxsparse.common.numbers import finite_or_none
from jaxsparse.common.progress import progress
from jaxsparse.data.rows import load_rows
from jaxsparse.evaluate.held_out import Measurement, encode_held_out, measure
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
    too_long: Literal["error", "drop"] = "error"
    """What to do with rows whose answer leaves no room for a prompt in max_length."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; None: that of the delta, which belongs to one, or float32 without a delta."""
    predictions: Path | None = None
    """Write every prediction to this JSON file."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments, measures, and prints the result."""
    config = parse(lambda given: EvaluateConfig, "jaxsparse evaluate", arguments)
    for name in ("rows", "batch"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    rows = load_rows(config.data)[: config.rows]
    if config.predictions is not None:
        _check_file(config.predictions)
    delta = deltas.load(config.delta) if config.delta is not None else None
    own = dtype_of(delta) if delta is not None else None
    if config.dtype and own and config.dtype != own:
        raise InputError(f"the delta {config.delta} is of {own} weights, not {config.dtype}; leave out --dtype")
    checkpoint = load(config.model, dtype=config.dtype or own or "float32")
    if checkpoint.tokenizer is None:
        raise InputError(f"model {checkpoint.name} has no tokenizer; add its tokenizer.json to {checkpoint.folder}")
    model = LanguageModel(checkpoint.config)
    options = {name: getattr(config, name) for name in ("max_length", "max_new_tokens", "template", "too_long")}
    held_out = encode_held_out(model, checkpoint.tokenizer, rows, **options)
    params = checkpoint.params
    if delta is not None:
        params = deltas.apply(params, delta, donate=True, base_fingerprint=checkpoint.fingerprint)
    with progress("measuring", 2 * len(held_out.rows)) as advance:
        measured = measure(
            model, params, checkpoint.tokenizer, held_out, batch=config.batch, advance=lambda units: advance(units, "")
        )
    if config.predictions is not None:
        written = [
            {"instruction": row.instruction, "answer": row.answer, "prediction": text}
            for row, text in zip(held_out.rows, measured.predictions, strict=True)
        ]
        atomic_write_text(config.predictions, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    _show(measured, as_json=config.json)
    return 0


def _check_file(file: Path) -> None:
    """Checks before long work that a file can be written."""
    if file.is_dir():
        raise InputError(f"cannot write {file}: it is a folder; give a file's name")
    check_writable(file.parent)


def _show(measured: Measurement, *, as_json: bool) -> None:
    result = {name: getattr(measured, name) for name in ("loss", "perplexity", "exact_match", "rows")}
    if as_json:
        print(json.dumps({name: finite_or_none(value) for name, value in result.items()}, allow_nan=False))
        return
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    Console().print(table)
