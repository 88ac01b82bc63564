"""What an instruction row lets one choose from, and the texts whose likelihoods say what a model would choose."""

import re
from dataclasses import dataclass

from jaxsparse.common.errors import InputError
from jaxsparse.data.rows import Row

__all__ = ["Options", "completions", "parse_options"]

_TRUTH = ("true", "false")
_INTRODUCTION = re.compile(r"Please (?:choose|answer)[^:]*?(?:question|sentence|passage|number)[^:.]*[:.]\s*")
_FORMAT = re.compile(r"\s*Answer format:(?P<format>[^\n]*)$", re.IGNORECASE)
_NUMBERED = re.compile(r"(?P<family>Answer|Solution|Option|Ending)\s?1:")
_LETTERED = re.compile(r"Answer Choices:\s*(?=\(A\))", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """What a row lets one choose from.

    Attributes:
        question: the question, without the options and what frames it.
        labels: what the options are called, as the row's answer spells it, such as "answer1" or "Option 1".
        texts: what each says; the labels, where they stand for nothing else.
        right: the number of the right one, from 0.
        fills_blank: whether the options fill a blank "_" in the question.
        continues: whether the options go on where the question ends.
    """

    question: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    right: int
    fills_blank: bool = False
    continues: bool = False


def parse_options(row: Row) -> Options:
    r"""Reads the options out of an instruction, in the wording of LLM-Adapters and of NumGLUE's rows.

    Args:
        row: a row of BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC, OpenBookQA, AQuA or NumGLUE's type 3, or another
            that ends in "Answer format: a/b".

    Returns:
        The options.

    Raises:
        InputError: the instruction names no options, or the answer is none of them.

    Example:
        >>> options = parse_options(Row("Please choose the correct solution to the question: How to cool a room?\n\n"
        ...     "Solution1: Open a window\n\nSolution2: Light a fire\n\nAnswer format: solution1/solution2",
        ...     "", "", "solution1"))
        >>> options.question, options.labels, options.texts
        ('How to cool a room?', ('solution1', 'solution2'), ('Open a window', 'Light a fire'))
    """
    text, answer = row.instruction.strip(), row.answer.strip()
    form = _FORMAT.search(text)
    body = text[: form.start()] if form else text
    question, labels, texts = _numbered(body, answer) or _lettered(body) or (body, (), ())
    if form and not labels and "/" in form["format"]:
        labels = texts = tuple(label.strip() for label in form["format"].split("/"))
    if answer not in labels:
        raise InputError(
            f"the question must name its options, as 'Answer format: a/b' at its end does, and the right answer "
            f"{answer!r} among them; it has {', '.join(labels) or 'none'}: {text[-60:]!r}"
        )
    introduction = _INTRODUCTION.match(question)
    opening = introduction[0] if introduction else ""
    bare = re.sub(r"^\s*question:\s*", "", question[len(opening) :], flags=re.IGNORECASE)
    return Options(
        question=re.sub(r"\s*Options:\s*$", "", bare).strip(),
        labels=labels,
        texts=texts,
        right=labels.index(answer),
        fills_blank="fill in the blank" in opening and "_" in bare,
        continues="ending" in opening,
    )


def completions(options: Options) -> list[tuple[str, str]]:
    """Returns for every option the text before it and the text that is scored.

    They are the forms in which language models are compared without fine-tuning: "Question: …", a new line and
    "Answer:" before the option; a sentence's beginning before its endings; a sentence up to its blank with the option
    put in, before the rest of it, which is scored and is the same for all; "yes" and "no" for true and false.

    Args:
        options: what to choose from.

    Returns:
        Pairs of texts, one an option; the second begins with a space.

    Example:
        >>> completions(Options("It hid as _ barked.", ("option1", "option2"), ("the cat", "the dog"), 1, True))
        [('It hid as the cat', ' barked.'), ('It hid as the dog', ' barked.')]
    """
    question = options.question
    if options.fills_blank:
        before, _, after = question.partition("_")
        return [(before + text, f" {after.strip()}" if after.strip() else " .") for text in options.texts]
    if options.continues:
        return [(question, f" {text}") for text in options.texts]
    words = ("yes", "no") if options.labels == _TRUTH else options.texts
    return [(f"Question: {question}\nAnswer:", f" {word}") for word in words]


_Parts = tuple[str, tuple[str, ...], tuple[str, ...]]


def _numbered(body: str, answer: str) -> _Parts | None:
    """Question, labels and texts of "Answer1: … Answer2: …", in this order."""
    first = _NUMBERED.search(body)
    if first is None:
        return None
    family = first["family"]
    starts, ends = [first.start()], [first.end()]
    while mark := re.compile(rf"{family}\s?{len(starts) + 1}:").search(body, ends[-1]):
        starts.append(mark.start())
        ends.append(mark.end())
    name = family if answer[:1].isupper() else family.lower()
    space = " " if " " in answer else ""
    labels = tuple(f"{name}{space}{number}" for number in range(1, len(starts) + 1))
    texts = tuple(body[start:end].strip() for start, end in zip(ends, [*starts[1:], len(body)], strict=True))
    return body[: first.start()], labels, texts


def _lettered(body: str) -> _Parts | None:
    """Question, labels and texts of "Answer Choices: (A) … (B) …"."""
    found = _LETTERED.search(body)
    if found is None:
        return None
    starts = [found.end()]
    for letter in "BCDE":
        at = body.find(f"({letter})", starts[-1])
        if at < 0:
            break
        starts.append(at)
    texts = tuple(body[start + 3 : end].strip() for start, end in zip(starts, [*starts[1:], len(body)], strict=True))
    return body[: found.start()], tuple("ABCDE"[: len(starts)]), texts
