"""Instruction rows: reading them from JSON and JSON Lines, gzipped or not."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError

__all__ = ["Row", "load_rows"]

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One instruction with what should be said to it.

    Attributes:
        instruction: the question or task; never empty.
        input: further context; often empty.
        output: the full response, which may hold a rationale; empty where the file has none.
        answer: what the response is scored on; never empty.
    """

    instruction: str
    input: str
    output: str
    answer: str


def load_rows(path: str | Path) -> list[Row]:
    """Reads instruction rows from a file.

    A row is an object with the keys `instruction`, `input`, `output` and `answer`; others are ignored, and
    null is the same as a missing key. `answer` may be a number, and falls back to `output` where it is
    missing; one of the two must be there.

    Args:
        path: a `.json` file (one list of rows) or a `.jsonl` file (one row a line), or either with `.gz`.

    Returns:
        The rows in the file's order; at least one.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file or one of its rows is malformed; the message names the line the row starts on.

    Example:
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name, "rows.jsonl")
        >>> _ = path.write_text('{"instruction": "What is 17 + 19?", "answer": 36}')
        >>> load_rows(path)
        [Row(instruction='What is 17 + 19?', input='', output='', answer='36')]
        >>> folder.cleanup()
    """
    path = Path(path)
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in (".json", ".jsonl", ".json.gz", ".jsonl.gz"):
        raise InputError(f"{path}: the name must end in .json, .jsonl, .json.gz or .jsonl.gz")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold at least one row")
    values = (_values_of_list if suffix.removesuffix(".gz") == ".json" else _values_of_lines)(text, path)
    rows = [_row(value, f"{path}, line {line}") for line, value in values]
    if not rows:
        raise InputError(f"{path}: the list is empty; it must hold at least one row")
    return rows


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a complete gzip file ({error})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def _decode(text: str, position: int, line: int, path: Path) -> tuple[Any, int]:
    """Returns the JSON value that starts at a position of the text on a given line, and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        line += text.count("\n", position, error.pos)
        raise InputError(f"{path}, line {line}, column {error.colno}: malformed JSON ({error.msg})") from error
    except ValueError as error:
        raise InputError(f"{path}, line {line}: malformed JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{path}, line {line}: the row is nested too deeply") from error


def _values_of_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields every line's value with its line number, counted from 1."""
    for line, content in enumerate(text.rstrip().split("\n"), start=1):
        start = _skip_space(content, 0)
        if start == len(content):
            raise InputError(f"{path}, line {line}: the line is empty; every line must hold a row")
        value, end = _decode(content, start, line, path)
        if _skip_space(content, end) != len(content):
            raise InputError(f"{path}, line {line}: something follows the row; put one row on a line")
        yield line, value


def _values_of_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Yields every element of a JSON list with the number of the line it starts on, counted from 1.

    The list is walked element by element, because a parsed list no longer knows its lines.
    """
    position = _skip_space(text, 0)
    line = text.count("\n", 0, position) + 1
    if text[position] != "[":
        raise InputError(f"{path}, line {line}: the file must hold one JSON list; name it .jsonl if not")
    closer_allowed = True
    while True:
        start = _skip_space(text, position + 1)
        line += text.count("\n", position, start)
        if closer_allowed and text[start : start + 1] == "]":
            break
        closer_allowed = False
        value, end = _decode(text, start, line, path)
        yield line, value
        position = _skip_space(text, end)
        line += text.count("\n", start, position)
        if text[position : position + 1] == "]":
            start = position
            break
        if text[position : position + 1] != ",":
            raise InputError(f"{path}, line {line}: malformed JSON (expected ',' or ']' after a row)")
    if _skip_space(text, start + 1) != len(text):
        raise InputError(f"{path}, line {line}: something follows the end of the list")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # the pattern matches the empty string
    return match.end()


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a row must be an object, not {_kind(value)}")
    fields = {name: _text(value, name, where) for name in ("instruction", "input", "output", "answer")}
    if not fields["instruction"].strip():
        raise InputError(f"{where}: 'instruction' is missing or empty")
    if not fields["answer"].strip():
        fields["answer"] = fields["output"]
    if not fields["answer"].strip():
        raise InputError(f"{where}: both 'answer' and 'output' are missing or empty; one is needed")
    return Row(**fields)


def _text(value: dict[str, Any], name: str, where: str) -> str:
    """Returns a field of a row as text, "" where it is missing."""
    field = value.get(name)
    if field is None:
        return ""
    if name == "answer" and isinstance(field, int | float) and not isinstance(field, bool):
        return str(field)
    if not isinstance(field, str):
        allowed = "text or a number" if name == "answer" else "text"
        raise InputError(f"{where}: {name!r} must be {allowed}, not {_kind(field)}")
    return field


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
