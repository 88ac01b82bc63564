"""Arithmetic word problems, generated: a small task on which learning shows within a few dozen steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.data.rows import Row

__all__ = ["HELD_OUT_NUMBERS", "generate_problems"]

Split = Literal["train", "held_out"]

# The form in which the GASDU authors published NumGLUE.
_PROMPT = (
    "Please answer the following question with a number.\n\nQuestion: {question}\n\nAnswer format: a number (no units)"
)

_LARGEST = 50
_LARGEST_FACTOR = 16
# Numbers that no training question contains. Multiples of 4, 7 and 9 are among them, so that the held-out
# split has divisions that come out even.
HELD_OUT_NUMBERS = frozenset({4, 7, 9, 13, 16, 21, 24, 28, 32, 35, 36, 42, 45, 48})

# Well below what either split can give, so that drawing until enough distinct problems are there is quick.
_MOST_PROBLEMS = 20_000


@dataclass(frozen=True)
class _Operation:
    """What is done with the two numbers of a question."""

    fits: Callable[[int, int], bool]
    result: Callable[[int, int], int]


_ADD = _Operation(lambda a, b: True, lambda a, b: a + b)
_SUBTRACT = _Operation(lambda a, b: a > b, lambda a, b: a - b)
_MULTIPLY = _Operation(lambda a, b: max(a, b) <= _LARGEST_FACTOR, lambda a, b: a * b)
_DIVIDE = _Operation(lambda a, b: a > b and a % b == 0, lambda a, b: a // b)

_TRAIN = {
    _ADD: (
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        "{name} found {a} {things} today and {b} {things} yesterday. How many {things} did {name} find in all?",
        "There are {a} {things} on the table and {b} {things} on the floor. How many {things} are there in total?",
        "{name} bought {a} {things}, and {other} bought {b} {things} more. How many {things} did {other} buy?",
        "A shop sold {a} {things} on Monday and {b} on Tuesday. How many {things} did it sell on both days?",
        "After giving away {b} {things}, {name} still has {a} {things}. How many {things} were there at first?",
    ),
    _SUBTRACT: (
        "{name} had {a} {things} and gave {b} of them to {other}. How many {things} does {name} have left?",
        "A box held {a} {things}. {name} took out {b}. How many {things} are still in the box?",
        "{name} has {a} {things}. {other} has {b} {things}. How many more {things} does {name} have than {other}?",
        "{name} needs {a} {things} and already has {b}. How many more {things} does {name} need?",
        "Of {a} {things}, {b} are old and the others are new. How many {things} are new?",
        "{name} and {other} have {a} {things} together. {other} has {b}. How many {things} does {name} have?",
    ),
    _MULTIPLY: (
        "{name} has {a} bags with {b} {things} in each bag. How many {things} does {name} have?",
        "There are {a} shelves, and each shelf holds {b} {things}. How many {things} are there on all shelves?",
        "{name} makes {a} {things} every day. How many {things} does {name} make in {b} days?",
        "Each of {a} children brings {b} {things}. How many {things} do the children bring?",
        "One of the {things} costs {a} dollars. How many dollars do {b} {things} cost?",
        "{name} puts {things} in {a} rows of {b}. How many {things} are in the rows?",
    ),
    _DIVIDE: (
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "{a} {things} are packed in boxes of {b}. How many boxes are needed?",
        "{name} paid {a} dollars for {b} {things} of the same price. How many dollars did one of them cost?",
        "{name} puts {a} {things} in {b} equal piles. How many {things} are in each pile?",
        "In {b} days {name} collected {a} {things}, each day the same number. How many {things} were that a day?",
        "{b} trucks carry {a} {things}, each truck the same number. How many {things} does one truck carry?",
    ),
}

_HELD_OUT = {
    _ADD: (
        "A basket holds {a} {things}. {name} puts in another {b}. What is the number of {things} in the basket?",
        "{name} counted {a} {things} at home and {b} at school. What is the sum of {name}'s {things}?",
    ),
    _SUBTRACT: (
        "{name} picked {a} {things} but lost {b} on the way. With how many {things} did {name} come home?",
        "{other} owns {b} {things}, fewer than {name}, who owns {a}. What is the difference?",
    ),
    _MULTIPLY: (
        "A garden has {a} corners with {b} {things} in every corner. What is the number of {things} in the garden?",
        "{name} reads {a} pages about {things} each evening. How many pages does {name} read in {b} evenings?",
    ),
    _DIVIDE: (
        "{b} teams split {a} {things} evenly. What is the number of {things} for every team?",
        "{name} ties {a} {things} into bundles of {b}. What is the number of bundles?",
    ),
}

# fmt: off
_NAMES = (
    "Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mara",
    "Noah", "Olga", "Pablo", "Rosa", "Sam", "Tara", "Umar", "Vera", "Wade", "Yara", "Zoe",
)
_THINGS = (
    "apples", "books", "candles", "cards", "coins", "cookies", "crayons", "cups", "eggs", "flowers", "keys",
    "lemons", "marbles", "melons", "oranges", "pencils", "plates", "postcards", "puzzles", "ribbons", "shells",
    "stamps", "stickers", "toys",
)
# fmt: on


def generate_problems(count: int, *, split: Split, seed: int) -> list[Row]:
    """Generates single-step word problems with small numbers, in NumGLUE's prompt form.

    The splits share neither templates nor numbers: held-out questions are worded by templates that no training
    question uses, and their numbers, `HELD_OUT_NUMBERS`, occur in no training question. Sums, differences,
    products and quotients all come out as positive whole numbers; those may be the same in both splits.

    Args:
        count: how many; the same seed with a larger count goes on where the smaller one stopped.
        split: "train" or "held_out".
        seed: the only source of randomness; not negative.

    Returns:
        The problems, no two alike. `output` is the answer in a sentence, as in NumGLUE's files.

    Raises:
        InputError: the count is negative or above 20,000, the seed is negative, or the split is unknown.

    Example:
        >>> row = generate_problems(1, split="train", seed=1)[0]
        >>> row.instruction.splitlines()[2]
        'Question: Yara and Sam have 38 cards together. Sam has 8. How many cards does Yara have?'
        >>> row.answer, row.output
        ('30', 'the correct answer is 30')
    """
    if split not in ("train", "held_out"):
        raise InputError(f"split={split!r}: must be 'train' or 'held_out'")
    if not 0 <= count <= _MOST_PROBLEMS:
        raise InputError(f"count={count}: must be between 0 and {_MOST_PROBLEMS}")
    if seed < 0:
        raise InputError(f"seed={seed}: must not be negative")
    by_operation = _TRAIN if split == "train" else _HELD_OUT
    templates = [(operation, text) for operation, texts in by_operation.items() for text in texts]
    pairs = {operation: _pairs(operation, split) for operation in by_operation}
    rng = np.random.default_rng([seed, split == "held_out"])
    rows: dict[str, Row] = {}
    while len(rows) < count:
        operation, text = templates[rng.integers(len(templates))]
        a, b = pairs[operation][rng.integers(len(pairs[operation]))]
        name, other = (_NAMES[i] for i in rng.choice(len(_NAMES), size=2, replace=False))
        things = _THINGS[rng.integers(len(_THINGS))]
        question = text.format(a=a, b=b, name=name, other=other, things=things)
        answer = str(operation.result(a, b))
        instruction = _PROMPT.format(question=question)
        rows.setdefault(question, Row(instruction, "", f"the correct answer is {answer}", answer))
    return list(rows.values())


def _pairs(operation: _Operation, split: Split) -> list[tuple[int, int]]:
    """Returns the pairs of numbers that a split may put into the questions of an operation."""
    numbers = [n for n in range(2, _LARGEST + 1) if (n in HELD_OUT_NUMBERS) == (split == "held_out")]
    return [(a, b) for a in numbers for b in numbers if operation.fits(a, b)]
