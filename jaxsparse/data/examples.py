"""Examples: rows as token ids, the prompt apart from the answer."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxsparse.common.errors import InputError
from jaxsparse.data.prompts import Prompt, Template, TokenizerLike, TrainOn, answer_text, render_prompt
from jaxsparse.data.rows import Row

__all__ = ["Example", "encode_prompt", "encode_rows"]


@dataclass(frozen=True)
class Example:
    """A row as token ids.

    Attributes:
        prompt_ids: what the model sees; at least one token.
        answer_ids: what it should say, the closing token included.
        truncated: how many tokens the prompt lost to `max_length`.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    truncated: int = 0

    def __len__(self) -> int:
        """Returns the number of tokens of prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)


def encode_rows(
    rows: Iterable[Row],
    tokenizer: TokenizerLike,
    template: Template = "auto",
    max_length: int = 512,
    *,
    train_on: TrainOn = "answer",
    too_long: Literal["error", "drop"] = "error",
) -> list[Example]:
    """Turns rows into token ids, none longer than `max_length`.

    The answer is never cut. Where prompt and answer together are too long, the prompt's content loses its
    start and the template's frame around it stays; where not even the frame fits, the prompt loses its start.

    Args:
        rows: the instruction rows.
        tokenizer: turns text into ids, and brings the chat template and the closing token `eos_id`.
        template: which prompt to write; see `render_prompt`.
        max_length: the most tokens of prompt and answer together.
        train_on: which text of the row is the answer; see `answer_text`.
        too_long: what to do with a row whose answer leaves no room for any prompt: stop with an error, or
            drop the row and warn once with the number of rows dropped.

    Returns:
        One example a row, in order (without the dropped ones).

    Raises:
        InputError: the tokenizer has no closing token, no row is left, or a row's answer does not fit.
    """
    if max_length < 2:
        raise InputError(f"max_length={max_length}: must be at least 2, one token of prompt and one of answer")
    if too_long not in ("error", "drop"):
        raise InputError(f"too_long={too_long!r}: must be 'error' or 'drop'")
    if tokenizer.eos_id is None:
        raise InputError("the tokenizer has no end-of-text token (eos_id), which must close every answer")
    examples, dropped, total = [], 0, 0
    for total, row in enumerate(rows, start=1):
        prompt = render_prompt(row, tokenizer, template)
        prompt_ids = _encode_prompt(prompt, tokenizer)
        answer_ids = _encode_answer(prompt, prompt_ids, answer_text(row, train_on), tokenizer)
        room = max_length - len(answer_ids)
        if room >= 1:
            kept = _truncate(prompt_ids, prompt, tokenizer, room)
            examples.append(Example(tuple(kept), tuple(answer_ids), len(prompt_ids) - len(kept)))
        elif too_long == "drop":
            dropped += 1
        else:
            raise InputError(
                f"row {total}: its answer takes {len(answer_ids)} tokens, which leaves no room for a prompt in"
                f" max_length={max_length}; raise max_length, or drop such rows (too_long='drop')"
            )
    if not examples:
        raise InputError(f"no row fits in max_length={max_length}" if total else "there are no rows to encode")
    if dropped:
        warnings.warn(
            f"dropped {dropped} of {total} rows whose answers leave no room in max_length={max_length}",
            stacklevel=2,
        )
    return examples


def encode_prompt(row: Row, tokenizer: TokenizerLike, template: Template = "auto", max_length: int = 512) -> list[int]:
    """Returns the token ids of a row's prompt alone, as generation starts from them.

    Args:
        row: the instruction row.
        tokenizer: turns text into ids.
        template: which prompt to write; see `render_prompt`.
        max_length: the most tokens of the prompt; it is truncated as in `encode_rows`.

    Returns:
        The ids; those of `encode_rows` where neither is truncated.

    Raises:
        InputError: `max_length` is below 1.
    """
    if max_length < 1:
        raise InputError(f"max_length={max_length}: must be at least 1")
    prompt = render_prompt(row, tokenizer, template)
    return _truncate(_encode_prompt(prompt, tokenizer), prompt, tokenizer, max_length)


def _encode_prompt(prompt: Prompt, tokenizer: TokenizerLike) -> list[int]:
    ids = tokenizer.encode(prompt.text, prompt.add_bos)
    if not ids:
        raise InputError(f"the prompt {prompt.text!r} has no tokens")
    return ids


def _truncate(ids: list[int], prompt: Prompt, tokenizer: TokenizerLike, room: int) -> list[int]:
    """Returns at most `room` of a prompt's ids."""
    if len(ids) <= room:
        return ids
    head = tokenizer.encode(prompt.head, prompt.add_bos)
    content = tokenizer.encode(prompt.content, add_bos=False)
    tail = tokenizer.encode(prompt.tail, add_bos=False)
    kept = room - len(head) - len(tail)
    return ids[-room:] if kept < 1 else head + content[-kept:] + tail


def _encode_answer(prompt: Prompt, prompt_ids: list[int], answer: str, tokenizer: TokenizerLike) -> list[int]:
    """Returns the ids of the answer and the closing token.

    The ids are those the answer has after the prompt, since some tokenizers add a space at the start of a
    text; those it has on its own where its first letters would melt into the prompt's last token.
    """
    assert tokenizer.eos_id is not None
    both = tokenizer.encode(prompt.text + answer, prompt.add_bos)
    if both[: len(prompt_ids)] == prompt_ids and len(both) > len(prompt_ids):
        answer_ids = both[len(prompt_ids) :]
    else:
        answer_ids = tokenizer.encode(answer, add_bos=False)
    return [*answer_ids, tokenizer.eos_id]
