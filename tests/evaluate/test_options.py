"""Options read out of instructions, in the wording of every suite."""

from pathlib import Path

import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.data.rows import Row
from jaxsparse.evaluate.options import Options, completions, parse_options
from jaxsparse.evaluate.suites import load_task

_END = "\n\n{options}\n\nAnswer format: {labels}"
WORDINGS = {
    "answer": "Please choose the correct answer to the question: {question}" + _END,
    "solution": "Please choose the correct solution to the question: {question}" + _END,
    "option": "Please choose the correct answer to fill in the blank to complete the given sentence: {question}\n\n"
    "{options} Answer format: {labels}",
    "ending": "Please choose the correct ending to complete the given sentence: {question}" + _END,
}
WORDS = ["the dog", "Answer2 (a book)", "12:30: noon", "H2O: water", "a fox. It ran", "why? because"]


@pytest.mark.parametrize("family", WORDINGS)
def test_what_was_put_in_is_read_out(family: str, rng: np.random.Generator) -> None:
    for _ in range(20):
        texts = tuple(str(word) for word in rng.choice(WORDS, rng.integers(2, 6), replace=False))
        question = f"Monday: what does _ question {rng.integers(100)}?"
        labels = tuple(f"{family}{number}" for number in range(1, len(texts) + 1))
        right = int(rng.integers(len(texts)))
        spelled = [f"{family.title()}{number}: {text}" for number, text in enumerate(texts, 1)]
        instruction = WORDINGS[family].format(
            question=question, options=str(rng.choice([" ", "\n\n"])).join(spelled), labels="/".join(labels)
        )
        found = parse_options(Row(instruction, "", "", labels[right]))
        assert found == Options(question, labels, texts, right, family == "option", family == "ending")


def test_true_and_false_letters_and_numglue() -> None:
    truth = "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false"
    assert parse_options(Row(truth, "", "", "false")) == Options("is it so?", ("true", "false"), ("true", "false"), 1)
    letters = "What is (A+B) of it? Answer Choices: (A) 1/2 (B) 3 km (C) none"
    assert parse_options(Row(letters, "", "", "C")) == Options(
        "What is (A+B) of it?", ("A", "B", "C"), ("1/2", "3 km", "none"), 2
    )
    numglue = (
        "Please choose the correct option for the question.\n\nQuestion: Who is late? \n\nOptions:\nOption1: Ann\n"
        "Option2: Bob\n\nAnswer format: Option 1 / Option 2 / Option 3 / ..."
    )
    assert parse_options(Row(numglue, "", "", "Option 2")) == Options(
        "Who is late?", ("Option 1", "Option 2"), ("Ann", "Bob"), 1
    )


@pytest.mark.parametrize(
    ("instruction", "answer"), [("What is 3 + 4?", "7"), ("So?\n\nAnswer format: yes/no", "maybe")]
)
def test_questions_must_name_their_options(instruction: str, answer: str) -> None:
    with pytest.raises(InputError, match=f"must name its options.*'{answer}' among them"):
        parse_options(Row(instruction, "", "", answer))


def test_options_become_text_in_the_place_where_they_belong() -> None:
    labels = ("option1", "option2")
    blank = completions(Options("The _ ran.", labels, ("cat", "dog"), 0, fills_blank=True))
    assert [before + scored for before, scored in blank] == ["The cat ran.", "The dog ran."]
    assert completions(Options("He", labels, ("sat.", "ran."), 0, continues=True)) == [("He", " sat."), ("He", " ran.")]
    assert completions(Options("is it?", ("true", "false"), ("true", "false"), 0)) == [
        ("Question: is it?\nAnswer:", " yes"),
        ("Question: is it?\nAnswer:", " no"),
    ]


@pytest.mark.parametrize(
    "name",
    [f"commonsense/{name}" for name in ("boolq", "piqa", "social_i_qa", "winogrande", "ARC-Easy", "openbookqa")]
    + ["numglue/type3", "math/AQuA"],
)
def test_every_shared_row_names_its_options(shared: Path, name: str) -> None:
    for row in load_task(shared / "data", name).test:
        found = parse_options(row)
        assert found.labels[found.right] == row.answer.strip()
        assert len(found.texts) == len(found.labels) >= 2
        assert all(found.texts)
        assert found.question
        assert not found.question.startswith("Please")
        assert found.fills_blank == (name == "commonsense/winogrande")
