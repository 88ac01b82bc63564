import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.data import Row, generate_problems
from jaxsparse.data.arithmetic import HELD_OUT_NUMBERS
from jaxsparse.evaluate.answers import is_correct

SPLITS = ["train", "held_out"]
seeds = st.integers(0, 2**32)


def question(row: Row) -> str:
    match = re.fullmatch(
        r"Please answer the following question with a number\.\n\nQuestion: (.+)\n\n"
        r"Answer format: a number \(no units\)",
        row.instruction,
    )
    assert match is not None
    return match[1]


def numbers(row: Row) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", question(row))]


def wording(row: Row) -> str:
    """The question without its numbers, names and things: what is left of the template."""
    name_or_thing = r"\d+|[A-Z][a-z]{1,4}\b|\b(?!(?:does|days|boxes|bags|shelves|rows|dollars|friends)\b)\w+s\b"
    return re.sub(name_or_thing, "_", question(row))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, split=st.sampled_from(SPLITS))
def test_problems_are_right_distinct_and_repeatable(seed: int, split: str) -> None:
    rows = generate_problems(200, split=split, seed=seed)
    assert len({row.instruction for row in rows}) == len(rows) == 200
    assert generate_problems(50, split=split, seed=seed) == rows[:50]
    for row in rows:
        a, b = numbers(row)
        assert a != b or "ties" not in row.instruction
        possible = {a + b, abs(a - b), a * b, *((max(a, b) // min(a, b),) if max(a, b) % min(a, b) == 0 else ())}
        assert int(row.answer) in possible
        assert int(row.answer) > 0
        assert row.input == ""
        assert is_correct(row.output, row.answer)
        assert "{" not in row.instruction


# A word that decides the operation, written down here apart from the templates.
CUES = {
    r"gives .* more|found .* today|on the table|dollars? more|in all|both days|at first|puts in another|the sum": "+",
    r"have left|took out|How many more|are new|together|come home|the difference": "-",
    r"in each bag|shelves|every day|brings|dollars do|in the rows|every corner|each evening": "*",
    r"equally|boxes are needed|same price|equal piles|each day the same|trucks|teams|bundles": "/",
}
RESULTS = {"+": lambda a, b: a + b, "-": lambda a, b: abs(a - b), "*": lambda a, b: a * b}


@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_is_what_the_wording_asks_for(split: str) -> None:
    seen = set()
    for row in generate_problems(1500, split=split, seed=7):
        text = question(row)
        if re.search(r"bought .* more\. How many", text):
            signs = {"+"}
        else:
            signs = {sign for cue, sign in CUES.items() if re.search(cue, text)}
        assert len(signs) == 1, text
        (sign,) = signs
        a, b = sorted(numbers(row), reverse=True)
        expected = a // b if sign == "/" else RESULTS[sign](a, b)
        assert int(row.answer) == expected, text
        seen.add(sign)
    assert seen == set("+-*/")


@settings(max_examples=10, deadline=None)
@given(train_seed=seeds, held_out_seed=seeds)
def test_the_splits_share_no_number_and_no_wording(train_seed: int, held_out_seed: int) -> None:
    train = generate_problems(400, split="train", seed=train_seed)
    held_out = generate_problems(400, split="held_out", seed=held_out_seed)
    assert {n for row in train for n in numbers(row)}.isdisjoint(HELD_OUT_NUMBERS)
    assert {n for row in held_out for n in numbers(row)} <= HELD_OUT_NUMBERS
    assert {wording(row) for row in train}.isdisjoint({wording(row) for row in held_out})


def test_the_problems_are_varied() -> None:
    rows = generate_problems(2000, split="train", seed=3)
    assert len({wording(row) for row in rows}) >= 20
    assert len({name for row in rows for name in re.findall(r"\b[A-Z][a-z]{1,4}\b", question(row))}) >= 20
    assert len({row.answer for row in rows}) >= 50
    assert generate_problems(20, split="train", seed=4) != rows[:20]


@pytest.mark.parametrize("split", SPLITS)
def test_the_largest_count_can_be_had(split: str) -> None:
    assert len({row.instruction for row in generate_problems(20_000, split=split, seed=5)}) == 20_000


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="count=-1"):
        generate_problems(-1, split="train", seed=0)
    with pytest.raises(InputError, match="seed=-2"):
        generate_problems(1, split="train", seed=-2)
    with pytest.raises(InputError, match="count=20001: must be between 0 and 20000"):
        generate_problems(20_001, split="held_out", seed=0)
    assert generate_problems(0, split="train", seed=0) == []
