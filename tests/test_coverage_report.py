"""The coverage report fails where a public function is not entered, and nowhere else."""

from pathlib import Path

import pytest

from tests import coverage_report

MODULE = '''
"""A module."""


def entered(value):
    """Is called."""
    return value


def imported(value):
    """Is never called."""
    return value


def one_line(value): return value


class Shape:
    """A class."""

    def _private(self):
        return 1

    def method(
        self,
        value=1,
    ):
        return value
'''

TEST = """
import measured


def test_entered():
    assert measured.entered(1) == 1
    {more}
"""


def test_only_what_is_entered_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Neither importing a function nor an earlier run enters it."""
    (tmp_path / "measured.py").write_text(MODULE)
    (tmp_path / ".coveragerc").write_text("[run]\nsource = .\nomit = test_*\nparallel = true\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(coverage_report, "ROOT", tmp_path)
    calls = "assert measured.imported(1) == measured.one_line(1) == measured.Shape().method() == 1"
    for more, missed in ((calls, ["one_line"]), ("", ["imported", "one_line", "Shape.method"])):
        (tmp_path / "test_it.py").write_text(TEST.format(more=more))
        assert coverage_report.main(["test_it.py"]) == 1
        said = capsys.readouterr().out
        assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("measured.py: ")] == missed
    (tmp_path / "measured.py").write_text(MODULE.replace("): return value", "):\n    return value"))
    (tmp_path / "test_it.py").write_text(TEST.format(more=calls))
    assert coverage_report.main(["test_it.py"]) == 0
