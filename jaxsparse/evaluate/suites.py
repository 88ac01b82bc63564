"""The papers' tasks: where their rows lie under a data root, and test rows that training rows give away."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxsparse.common.errors import InputError
from jaxsparse.data.rows import Row, load_rows

__all__ = ["TASKS", "Task", "TaskRows", "TrainFrom", "available_tasks", "load_task", "question_of"]

Metric = Literal["number", "option", "truth", "letter"]
TrainFrom = Literal["own", "suite"]

_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
_SUITE_TRAIN = {"commonsense": "commonsense/commonsense_15k", "math": "math/math_10k"}
"""What the commonsense and the arithmetic tasks are trained on together (LLM-Adapters, NeuroAda, S²FT)."""


@dataclass(frozen=True)
class Task:
    """A task of the papers, by where it lies; all paths are relative to a data root and lack their suffix.

    Attributes:
        name: its folder, such as "numglue/type1".
        metric: what an answer is: all are told right from wrong by `jaxsparse.evaluate.is_correct`.
        max_new_tokens: room that a generated answer needs; a rationale's, where training rows have them.
        has_train: whether it may have training rows of its own; else it has its suite's.
        contaminated_by: the training rows known to hold some of its test questions, or None. Found afresh by
            `load_task`, whatever is said here.
    """

    name: str
    metric: Metric
    max_new_tokens: int
    has_train: bool = True
    contaminated_by: str | None = None

    @property
    def suite(self) -> str:
        """The suite that it belongs to: "numglue", "commonsense" or "math"."""
        return self.name.partition("/")[0]

    @property
    def train(self) -> str | None:
        """Its own training rows, or None."""
        return f"{self.name}/train" if self.has_train else None

    @property
    def suite_train(self) -> str | None:
        """The training rows of its whole suite, or None."""
        return _SUITE_TRAIN.get(self.suite)

    @property
    def dev(self) -> str:
        """Its development rows."""
        return f"{self.name}/dev"

    @property
    def test(self) -> str:
        """Its test rows."""
        return f"{self.name}/test"


def _math(folder: str, metric: Metric = "number", *, contaminated: bool = False) -> Task:
    # 256 as LLM-Adapters generates: a rationale comes before the answer.
    return Task(
        f"math/{folder}", metric, 256, has_train=False, contaminated_by=_SUITE_TRAIN["math"] * contaminated or None
    )


def _all_tasks() -> dict[str, Task]:
    tasks = [
        *(Task(f"numglue/type{kind}", "option" if kind == 3 else "number", 24) for kind in (1, 3, 4, 5)),
        *(Task(f"numglue/type{kind}", "number", 24, contaminated_by=f"numglue/type{kind}/train") for kind in (2, 8)),
        Task("commonsense/boolq", "truth", 24),
        Task("commonsense/piqa", "option", 24, contaminated_by="commonsense/piqa/train"),
        Task("commonsense/social_i_qa", "option", 24),
        Task("commonsense/hellaswag", "option", 24),
        Task("commonsense/winogrande", "option", 24),
        Task("commonsense/ARC-Easy", "option", 24, contaminated_by="commonsense/ARC-Easy/train"),
        Task("commonsense/ARC-Challenge", "option", 24),
        Task("commonsense/openbookqa", "option", 24),
        *(_math(folder, contaminated=True) for folder in ("AddSub", "MultiArith", "SingleEq", "mawps")),
        *(_math(folder) for folder in ("SVAMP", "gsm8k")),
        _math("AQuA", "letter"),
    ]
    return {task.name: task for task in sorted(tasks, key=lambda task: task.name)}


TASKS = _all_tasks()
"""All tasks by name: NumGLUE's six, the commonsense eight and the seven arithmetic sets."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of a task; no row of `dev` or `test` asks what a row of `train` asks.

    Attributes:
        task: the task.
        train: what to train on.
        dev: what to choose hyper-parameters on; empty where the task has none.
        test: what to report.
        given_away: rows taken out of `dev` and `test` because `train` holds their questions.
    """

    task: Task
    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    given_away: tuple[Row, ...]


def load_task(data_root: str | Path, name: str, *, train_from: TrainFrom = "own") -> TaskRows:
    """Reads a task and takes out of its dev and test rows those whose questions are in its training rows.

    Two rows ask the same where instruction and input agree but for space: NumGLUE's type 2 loses 34 test rows (32
    questions), and of the arithmetic sets that math_10k holds most of, little is left.

    Args:
        data_root: the folder that holds "numglue", "commonsense" and "math".
        name: a task of `TASKS`.
        train_from: the task's own training rows, where it has any, or its suite's ("suite": commonsense_15k, math_10k).

    Returns:
        The rows.

    Raises:
        InputError: no such folder or task, its rows are not there, or every test row is in the training rows.
    """
    root = Path(data_root)
    task = _task(root, name)
    if train_from not in ("own", "suite"):
        raise InputError(f"train_from={train_from!r}: must be 'own' or 'suite'")
    test_file = _file(root, task.test)
    if test_file is None:
        raise InputError(f"task {name!r}: no {task.test}.json under data_root={root}; {_what_is_there(root)}")
    train = load_rows(_train_file(root, task, train_from))
    dev_file = _file(root, task.dev)
    asked = {question_of(row) for row in train}
    dev, dev_given_away = _apart(load_rows(dev_file) if dev_file else [], asked)
    test, test_given_away = _apart(load_rows(test_file), asked)
    if not test:
        raise InputError(f"task {name!r}: every question of {test_file} is in its training rows; nothing is held out")
    return TaskRows(task, tuple(train), dev, test, dev_given_away + test_given_away)


def available_tasks(data_root: str | Path) -> tuple[str, ...]:
    """Returns the names of the tasks whose test rows lie under a data root, in order."""
    return tuple(name for name, task in TASKS.items() if _file(Path(data_root), task.test) is not None)


def _task(root: Path, name: str) -> Task:
    if not root.is_dir():
        raise InputError(f"data_root={root}: no such folder; give the one that holds numglue, commonsense and math")
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; {_what_is_there(root)}")
    return TASKS[name]


def _what_is_there(root: Path) -> str:
    names = available_tasks(root)
    return f"there are {', '.join(names)}" if names else f"no known task lies there, such as {next(iter(TASKS))}"


def _train_file(root: Path, task: Task, train_from: TrainFrom) -> Path:
    order = (task.train, task.suite_train) if train_from == "own" else (task.suite_train,)
    places = [place for place in order if place is not None]
    if not places:
        raise InputError(f"task {task.name!r}: its suite has no training rows in common; use train_from='own'")
    for place in places:
        if (file := _file(root, place)) is not None:
            return file
    raise InputError(
        f"task {task.name!r}: no {' or '.join(f'{place}.json' for place in places)} under data_root={root}"
    )


def _file(root: Path, place: str) -> Path | None:
    """The file at a place, whatever its suffix."""
    return next((file for suffix in _SUFFIXES if (file := root / (place + suffix)).is_file()), None)


def question_of(row: Row) -> str:
    """Returns what a row asks, but for space: rows of which that is the same are the same question."""
    return " ".join(f"{row.instruction}\n{row.input}".split())


def _apart(rows: Sequence[Row], asked: set[str]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Rows whose questions are not among those asked, and rows whose questions are."""
    kept = tuple(row for row in rows if question_of(row) not in asked)
    return kept, tuple(row for row in rows if question_of(row) in asked)
