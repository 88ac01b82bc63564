"""`jaxsparse generate`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxsparse import deltas
from jaxsparse.cli.arguments import parse
from jaxsparse.cli.delta_files import dtype_of, named_paths
from jaxsparse.common.errors import InputError
from jaxsparse.common.progress import progress
from jaxsparse.data.examples import encode_prompt
from jaxsparse.data.rows import Row
from jaxsparse.engine.serving import ServedModel
from jaxsparse.models.checkpoints import Checkpoint, load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate

__all__ = ["GenerateConfig", "main"]


@dataclass(frozen=True)
class GenerateConfig:
    """Continues prompts by a model, with any number of deltas side by side in one batch.

    With --prompt, the base and every delta answer every prompt. With --requests, every line of a file says which delta
    answers it: {"prompt": "2 + 2 =", "delta": "math"}, null for the base.

    Example: jaxsparse generate --model smollm2-135m --delta math=runs/math/delta --delta code=runs/code/delta
    --prompt "What is 12 times 12?"
    """

    model: str
    """A folder (ours or Hugging Face's), a .gguf or llama2.c file, or a known name such as smollm2-135m."""
    delta: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=PATH of a delta of that model; or a path, whose folder's name then names it. May be repeated."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A prompt. May be repeated."""
    requests: Path | None = None
    """A file of JSON lines, each with "prompt" and the name of a "delta" or null."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature)."""
    seed: int = 0
    """Of the randomness of a temperature above 0."""
    batch: int = 32
    """Rows at a time, whatever their deltas."""
    template: Literal["auto", "chat", "plain", "none"] = "auto"
    """How a prompt is put to the model. chat: by the tokenizer's chat template; plain: in Alpaca's words; none: as it
    is; auto: chat where there is a template, else plain, as fine-tuning does."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; None: that of the deltas, each of which belongs to one, or float32 without deltas."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON line for every answer instead of tables."""


class _Request(NamedTuple):
    prompt: str
    delta: str | None


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments, generates, and prints the answers."""
    config = parse(lambda given: GenerateConfig, "jaxsparse generate", arguments)
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed must lie between 0 and 2**32 - 1, got {config.seed}")
    if config.batch < 1:
        raise InputError(f"batch must be at least 1, got {config.batch}")
    paths = named_paths(config.delta)
    requests = _requests(config, list(paths))
    loaded = {name: deltas.load(path) for name, path in paths.items()}
    checkpoint = load(config.model, dtype=_dtype(config, loaded))
    if checkpoint.tokenizer is None:
        raise InputError(f"model {checkpoint.name} has no tokenizer; add its tokenizer.json to {checkpoint.folder}")
    prompts = [_encode(config, checkpoint, request.prompt) for request in requests]
    _check_lengths(config, checkpoint, requests, prompts)
    answers = _answers(config, checkpoint, loaded, requests, prompts)
    _show(requests, answers, as_json=config.json)
    return 0


def _requests(config: GenerateConfig, names: list[str]) -> list[_Request]:
    if bool(config.prompt) == (config.requests is not None):
        raise InputError("give either --prompt, or --requests with a file")
    if config.requests is None:
        return [_Request(prompt, name) for prompt in config.prompt for name in (None, *names)]
    found = []
    for number, line in enumerate(_lines(config.requests), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            request = _Request(content["prompt"], content.get("delta"))
            surplus = content.keys() - {"prompt", "delta"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f'{config.requests}, line {number}: expected {{"prompt": ..., "delta": ...}}') from error
        if surplus:
            raise InputError(f"{config.requests}, line {number}: unknown key {min(surplus)!r}")
        if not isinstance(request.prompt, str) or not request.prompt.strip():
            raise InputError(f"{config.requests}, line {number}: prompt must be a text, got {request.prompt!r}")
        if request.delta is not None and request.delta not in names:
            raise InputError(
                f"{config.requests}, line {number}: there is no delta {request.delta!r}; "
                f"there are {', '.join(map(repr, names)) or 'none'}: name them by --delta NAME=PATH"
            )
        found.append(request)
    if not found:
        raise InputError(f"{config.requests} holds no requests")
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --requests {file}: {error}") from error


def _encode(config: GenerateConfig, checkpoint: Checkpoint, prompt: str) -> list[int]:
    assert checkpoint.tokenizer is not None
    if config.template == "none":
        return checkpoint.tokenizer.encode(prompt)
    return encode_prompt(Row(prompt, "", "", "-"), checkpoint.tokenizer, config.template, sys.maxsize)


def _dtype(config: GenerateConfig, loaded: dict[str, deltas.Delta]) -> str:
    """The dtype to read the model in: all deltas must be of it."""
    found: dict[str, str] = {name: dtype for name, delta in loaded.items() if (dtype := dtype_of(delta))}
    wanted: str = config.dtype or next(iter(found.values()), "float32")
    for name, dtype in found.items():
        if dtype != wanted:
            raise InputError(f"delta {name!r} is of {dtype} weights, not {wanted}; all must be of --dtype")
    return wanted


def _check_lengths(
    config: GenerateConfig, checkpoint: Checkpoint, requests: Sequence[_Request], prompts: list[list[int]]
) -> None:
    room = checkpoint.config.max_position_embeddings - config.max_new_tokens
    for request, tokens in zip(requests, prompts, strict=True):
        if len(tokens) > room:
            raise InputError(
                f"prompt {request.prompt[:40]!r} has {len(tokens)} tokens, with --max-new-tokens "
                f"{config.max_new_tokens} more than the model's {checkpoint.config.max_position_embeddings} positions"
            )


def _answers(
    config: GenerateConfig,
    checkpoint: Checkpoint,
    loaded: dict[str, deltas.Delta],
    requests: Sequence[_Request],
    prompts: list[list[int]],
) -> list[str]:
    """Generates batch by batch; the last is filled up, so that one size is compiled."""
    tokenizer, params = checkpoint.tokenizer, checkpoint.params
    assert tokenizer is not None
    model: Any = LanguageModel(checkpoint.config)
    stacked = deltas.stack(loaded, base=params, base_fingerprint=checkpoint.fingerprint) if loaded else None
    size, texts = min(config.batch, len(requests)), []
    with progress("generating", len(requests)) as advance:
        for start in range(0, len(requests), size):
            rows = [min(row, len(requests) - 1) for row in range(start, start + size)]
            own: Any = params
            if stacked is not None:
                own = ServedModel(model).parameters(params, stacked, [requests[row].delta for row in rows])
            written = generate(
                model if stacked is None else ServedModel(model),
                own,
                [prompts[row] for row in rows],
                max_new_tokens=config.max_new_tokens,
                stop_ids=tokenizer.stop_ids,
                temperature=config.temperature,
                key=jax.random.fold_in(jax.random.key(config.seed), start),
            )
            texts += [tokenizer.decode(tokens) for tokens in written]
            advance(min(size, len(requests) - start))
    return texts[: len(requests)]


def _show(requests: Sequence[_Request], answers: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        for request, answer in zip(requests, answers, strict=True):
            print(json.dumps(request._asdict() | {"answer": answer}, ensure_ascii=False))
        return
    table = Table("prompt", "delta", "answer", show_lines=True)
    last = None
    for request, answer in zip(requests, answers, strict=True):
        shown = "" if request.prompt == last else request.prompt
        table.add_row(*(Text(text) for text in (shown, request.delta or "(base)", answer.strip())))
        last = request.prompt
    Console().print(table)
