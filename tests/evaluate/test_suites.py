"""The papers' tasks: what is read, what is taken out, and what is said where nothing is there."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.suites import TASKS, available_tasks, load_task


def write_rows(file: Path, questions: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([{"instruction": question, "answer": "1"} for question in questions])
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


def questions_of(rows: tuple) -> list[str]:
    return [row.instruction for row in rows]


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    write_rows(tmp_path / "numglue/type2/train.json", ["a", "b", "c"])
    write_rows(tmp_path / "numglue/type2/dev.json", ["d", "a"])
    write_rows(tmp_path / "numglue/type2/test.json", ["e", " b\n", "f", "b", "C"])
    write_rows(tmp_path / "math/math_10k.json.gz", ["x  y", "z"])
    write_rows(tmp_path / "math/AddSub/test.json", ["x y", "w"])
    write_rows(tmp_path / "commonsense/commonsense_15k.json.gz", ["p"])
    write_rows(tmp_path / "commonsense/boolq/train.json.gz", ["q"])
    write_rows(tmp_path / "commonsense/boolq/test.json", ["p", "q", "r"])
    return tmp_path


def test_no_held_out_row_asks_what_a_training_row_asks(data_root: Path) -> None:
    rows = load_task(data_root, "numglue/type2")
    assert questions_of(rows.train) == ["a", "b", "c"]
    assert questions_of(rows.dev) == ["d"]
    assert questions_of(rows.test) == ["e", "f", "C"]
    assert questions_of(rows.given_away) == ["a", " b\n", "b"]


def test_what_is_given_away_follows_the_training_rows(data_root: Path) -> None:
    assert questions_of(load_task(data_root, "commonsense/boolq").test) == ["p", "r"]
    together = load_task(data_root, "commonsense/boolq", train_from="suite")
    assert (questions_of(together.train), questions_of(together.test)) == (["p"], ["q", "r"])


def test_a_task_without_training_rows_has_its_suites(data_root: Path) -> None:
    rows = load_task(str(data_root), "math/AddSub")
    assert (questions_of(rows.train), questions_of(rows.test), rows.dev) == (["x  y", "z"], ["w"], ())


def test_rows_that_differ_in_input_are_different_questions(data_root: Path) -> None:
    file = data_root / "numglue/type2/test.json"
    file.write_text(json.dumps([{"instruction": "a", "input": "with this", "answer": "1"}]))
    assert questions_of(load_task(data_root, "numglue/type2").test) == ["a"]


def test_errors_say_what_is_there(data_root: Path) -> None:
    assert available_tasks(data_root) == ("commonsense/boolq", "math/AddSub", "numglue/type2")
    there = "there are commonsense/boolq, math/AddSub, numglue/type2"
    with pytest.raises(InputError, match=f"'numglue/type9' is unknown; {there}"):
        load_task(data_root, "numglue/type9")
    with pytest.raises(InputError, match=f"no commonsense/hellaswag/test.json under .*; {there}"):
        load_task(data_root, "commonsense/hellaswag")
    with pytest.raises(InputError, match="no such folder"):
        load_task(data_root / "missing", "numglue/type2")
    with pytest.raises(InputError, match="no known task lies there"):
        load_task(data_root / "math", "numglue/type2")
    with pytest.raises(InputError, match="use train_from='own'"):
        load_task(data_root, "numglue/type2", train_from="suite")


def test_missing_training_rows_and_nothing_held_out_are_errors(data_root: Path) -> None:
    (data_root / "numglue/type2/train.json").unlink()
    with pytest.raises(InputError, match=r"no numglue/type2/train.json under"):
        load_task(data_root, "numglue/type2")
    write_rows(data_root / "math/AddSub/test.json", ["z", "z "])
    with pytest.raises(InputError, match="nothing is held out"):
        load_task(data_root, "math/AddSub")


# shared/data/SOURCES.md counts questions; a question may be in a test file more than once.
CONTAMINATED = {"AddSub": 326, "MultiArith": 453, "SingleEq": 311, "mawps": 50, "AQuA": 0, "SVAMP": 0, "gsm8k": 0}


@pytest.mark.parametrize(
    ("name", "questions"),
    [("numglue/type2", 32), ("numglue/type8", 2), ("numglue/type1", 0)]
    + [(f"math/{folder}", count) for folder, count in CONTAMINATED.items()],
)
def test_the_shared_files_traps_are_seen(shared: Path, name: str, questions: int) -> None:
    rows = load_task(shared / "data", name)
    train = {row.instruction.strip() for row in rows.train}
    assert len({row.instruction.strip() for row in rows.given_away} & train) == questions
    assert (rows.task.contaminated_by is not None) == (questions > 0) == bool(rows.given_away)
    assert not train & {row.instruction.strip() for row in rows.test}


def test_every_shared_task_but_hellaswag_is_found(shared: Path) -> None:
    assert set(TASKS) - set(available_tasks(shared / "data")) == {"commonsense/hellaswag"}
    assert len(TASKS) == 6 + 8 + 7


def test_metrics_are_what_the_shared_answers_are(shared: Path, rng: np.random.Generator) -> None:
    patterns = {
        "option": r"(?i)(answer|option|solution) ?\d",
        "truth": "true|false",
        "letter": "[A-E]",
        "number": r".*\d.*",
    }
    for name in rng.permutation(available_tasks(shared / "data"))[:6]:
        rows = load_task(shared / "data", str(name))
        right = [row for row in rows.test if re.fullmatch(patterns[rows.task.metric], row.answer.strip())]
        # A few answers of NumGLUE's numbers are names.
        assert len(right) > 0.9 * len(rows.test)
