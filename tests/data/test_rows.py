import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.data import Row, load_rows

texts = st.text(st.characters(codec="utf-8"), max_size=20)
filled = texts.filter(str.strip)
rows_lists = st.lists(st.builds(Row, filled, texts, texts, filled), min_size=1, max_size=8)
in_tmp = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def as_dict(row: Row) -> dict[str, str]:
    return {"instruction": row.instruction, "input": row.input, "output": row.output, "answer": row.answer}


def write(path: Path, text: str) -> Path:
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@in_tmp
@given(rows=rows_lists, indent=st.none() | st.integers(0, 3), ascii_only=st.booleans())
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
def test_rows_come_back_as_written(
    tmp_path: Path, suffix: str, rows: list[Row], indent: int | None, ascii_only: bool
) -> None:
    dicts = [as_dict(row) for row in rows]
    if suffix.startswith(".jsonl"):
        text = "\n".join(json.dumps(d, ensure_ascii=ascii_only) for d in dicts) + "\n"
    else:
        text = json.dumps(dicts, indent=indent, ensure_ascii=ascii_only)
    assert load_rows(write(tmp_path / f"rows{suffix}", text)) == rows


@in_tmp
@given(rows=rows_lists, data=st.data())
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_bad_row_is_named_by_the_line_it_starts_on(
    tmp_path: Path, suffix: str, rows: list[Row], data: st.DataObject
) -> None:
    bad = data.draw(st.integers(0, len(rows) - 1))
    lines, line_of_bad, separator = [], 0, "," if suffix == ".json" else ""
    for i, row in enumerate(rows):
        value = {**as_dict(row), "instruction": " "} if i == bad else as_dict(row)
        indent = data.draw(st.none() | st.integers(0, 2)) if suffix == ".json" else None
        if suffix == ".json":
            lines += [""] * data.draw(st.integers(0, 2))
        line_of_bad = len(lines) + 1 if i == bad else line_of_bad
        lines += (json.dumps(value, indent=indent) + (separator if i < len(rows) - 1 else "")).split("\n")
    if suffix == ".json":
        lines, line_of_bad = ["", "[", *lines, "]"], line_of_bad + 2
    path = write(tmp_path / f"rows{suffix}", "\n".join(lines))
    with pytest.raises(InputError, match=rf"rows{suffix}, line {line_of_bad}: 'instruction' is missing or empty"):
        load_rows(path)


GOOD = '{"instruction": "i", "answer": "a"}'

BAD_FILES = {
    "empty.json": ("", "the file is empty"),
    "blank.jsonl": ("\n \n", "the file is empty"),
    "no_rows.json": ("[ ]", "the list is empty"),
    "object.json": (f"\n{GOOD}", "line 2: the file must hold one JSON list"),
    "truncated.json": (f"[{GOOD},\n{GOOD}", "line 2: malformed JSON"),
    "cut_row.json": (f'[{GOOD},\n{{"instruction":\n', "line 3, column 1: malformed JSON"),
    "trailing_comma.json": (f"[{GOOD},\n]", "line 2, column 1: malformed JSON"),
    "no_comma.json": (f"[{GOOD}\n\n{GOOD}]", "line 3: malformed JSON .expected ','"),
    "after_the_list.json": (f"[{GOOD}]\n{GOOD}", "something follows the end of the list"),
    "not_a_number.json": ('[{"instruction": "i", "answer": NaN}]', "line 1: malformed JSON .NaN"),
    "deep.json": (f"[{GOOD},\n" + "[" * 200_000, "line 2: the row is nested too deeply"),
    "text_row.json": (f'[{GOOD},\n"text"]', "line 2: a row must be an object, not text"),
    "list_row.jsonl": (f"{GOOD}\n[1]", "line 2: a row must be an object, not a list"),
    "two_rows.jsonl": (f"{GOOD}\n{GOOD} {GOOD}", "line 2: something follows the row"),
    "empty_line.jsonl": (f"{GOOD}\n\n{GOOD}", "line 2: the line is empty"),
    "malformed.jsonl": (f"{GOOD}\n{{'instruction': 1}}", "line 2, column 2: malformed JSON"),
    "no_instruction.jsonl": (f'{GOOD}\n{{"answer": "a"}}', "line 2: 'instruction' is missing or empty"),
    "no_answer.jsonl": ('{"instruction": "i", "input": "x", "output": " "}', "line 1: both 'answer' and 'output'"),
    "number.jsonl": ('{"instruction": 3, "answer": "a"}', "line 1: 'instruction' must be text, not a number"),
    "list.jsonl": ('{"instruction": "i", "output": ["a"]}', "line 1: 'output' must be text, not a list"),
    "boolean.jsonl": ('{"instruction": "i", "answer": true}', "'answer' must be text or a number, not a boolean"),
    "name.csv": ("instruction,answer", "must end in .json, .jsonl, .json.gz or .jsonl.gz"),
    "text.gz": ("a", "must end in .json"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_malformed_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    text, message = BAD_FILES[name]
    with pytest.raises(InputError, match=message) as caught:
        load_rows(write(tmp_path / name, text))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such data file"):
        load_rows(tmp_path / "nowhere.json")


@pytest.mark.parametrize("damage", ["plain text", "truncated", "flipped"])
def test_a_damaged_gzip_file_is_one_clear_line(tmp_path: Path, damage: str, rng: np.random.Generator) -> None:
    content = bytearray(gzip.compress(json.dumps([{"instruction": "i", "answer": int(rng.integers(1e9))}]).encode()))
    if damage == "truncated":
        content = content[: rng.integers(1, len(content))]
    elif damage == "flipped":
        content[-5 - rng.integers(3)] ^= 0xFF  # in the checksum
    path = tmp_path / "rows.json.gz"
    path.write_bytes(b"[]" if damage == "plain text" else bytes(content))
    with pytest.raises(InputError, match=r"rows\.json\.gz: not a complete gzip file"):
        load_rows(path)


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + '{"instruction": "é", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(InputError, match="line 2: not UTF-8"):
        load_rows(path)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert load_rows(path) == [Row("i", "", "", "a")] * 2


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ('"answer": 36', "36"),
        ('"answer": -4.5', "-4.5"),
        ('"output": "so 36"', "so 36"),
        ('"answer": null, "output": "so 36", "input": null, "id": [7]', "so 36"),
        ('"answer": "", "output": "so 36"', "so 36"),
        ('"answer": "36", "output": "so 36"', "36"),
    ],
)
def test_the_answer_may_be_a_number_and_falls_back_to_the_output(tmp_path: Path, fields: str, answer: str) -> None:
    (row,) = load_rows(write(tmp_path / "rows.json", f'[{{"instruction": "i", {fields}}}]'))
    assert row.answer == answer
    assert row.input == ""


# Rows in each file, as SOURCES.md counts them.
SHARED_ROWS = {
    "numglue/type1/train.json": 282,
    "numglue/type2/test.json": 325,
    "numglue/type3/dev.json": 81,
    "numglue/type4/train.json": 770,
    "numglue/type5/train.json": 393,
    "numglue/type8/test.json": 254,
    "math/math_10k.json.gz": 9919,
    "math/mawps/test.json": 238,
    "commonsense/ARC-Easy/test.json.gz": 2376,
    "commonsense/boolq/train.json.gz": 9427,
}


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_the_shared_files_load_whole(shared: Path, name: str) -> None:
    assert len(load_rows(shared / "data" / name)) == SHARED_ROWS[name]
