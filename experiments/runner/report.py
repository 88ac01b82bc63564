"""The report of an experiment: what was asked, what was found, tables, pictures, and what the paper printed."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.runner.figures import save_picture
from experiments.runner.index import write_pages
from jaxsparse.common.files import atomic_write_text

__all__ = ["Report"]

Rows = Sequence[Mapping[str, Any]]


@dataclass
class Report:
    """Collects what `report.md` will say; tables and the data of pictures are written at once, as CSV.

    Attributes:
        folder: where everything goes.
        title: of the experiment.
        question: what it asks.
        failures: what went wrong, one line each.
        findings: (claim, whether it is seen or None where that cannot be told, evidence).
    """

    folder: Path
    title: str
    question: str
    failures: list[str] = field(default_factory=list)
    findings: list[tuple[str, bool | None, str]] = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)

    def finding(self, claim: str, seen: bool | None, evidence: str) -> None:
        """Says whether what the paper claims is seen here.

        Args:
            claim: the paper's, in a line.
            seen: whether it is; None where it cannot be told.
            evidence: the numbers.
        """
        self.findings.append((claim, None if seen is None else bool(seen), evidence))

    def failure(self, line: str) -> None:
        """Notes what went wrong; the runner's exit status tells."""
        self.failures.append(line)

    def text(self, paragraph: str) -> None:
        """Adds a paragraph."""
        self._parts.append(paragraph)

    def table(self, name: str, rows: Rows, caption: str) -> None:
        """Adds a table, and writes `name.csv`.

        Args:
            name: of the file.
            rows: mappings from column to value, all of the same columns.
            caption: what it shows, units included.
        """
        if not rows:
            self.failure(f"the table {name} has no rows: no trial that it shows went well")
            return
        _write_csv(self.folder / f"{name}.csv", rows)
        self._parts.append(f"**{caption}** ([{name}.csv]({name}.csv))\n\n{_markdown(rows)}")

    def picture(self, name: str, figure: Figure, rows: Rows, caption: str) -> None:
        """Adds a picture, and writes `name.png` and the data behind it, `name.csv`.

        Args:
            name: of the files.
            figure: the picture; every panel has a title or the figure has one, and axes have labels.
            rows: the data that it shows.
            caption: what it shows.
        """
        if not rows:
            self.failure(f"the picture {name} has no data: no trial that it shows went well")
            return
        _write_csv(self.folder / f"{name}.csv", rows)
        save_picture(figure, self.folder / f"{name}.png")
        self._parts.append(f"**{caption}** (data: [{name}.csv]({name}.csv))\n\n![{caption}]({name}.png)")

    def printed(self, file: Path, caption: str) -> None:
        """Adds a table of the paper, from a CSV file that lies beside the experiment."""
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        self._parts.append(f"**The paper printed: {caption}**\n\n{_markdown(rows)}")

    def verdicts(self) -> list[str]:
        """The findings, a line each."""
        words = {True: "Seen at this scale", False: "NOT seen at this scale", None: "Cannot be told at this scale"}
        return [f"{words[seen]}: {claim} ({evidence})" for claim, seen, evidence in self.findings]

    def write(self, about: Mapping[str, Any]) -> Path:
        """Writes `report.md` and `findings.json`.

        Args:
            about: command, scale, settings, versions: what it takes to run it again.

        Returns:
            The report's file.
        """
        lines = [f"# {self.title}", self.question]
        lines += [f"* {verdict}" for verdict in self.verdicts()] or ["* Nothing was found: see below what failed."]
        if self.failures:
            lines += ["## What failed", *(f"* {failure}" for failure in self.failures)]
        told = json.dumps(about, indent=1, default=str)
        lines += ["## Results", *self._parts, "## How it was run", f"```json\n{told}\n```"]
        write_pages(self.folder / "report.md", _joined(lines))
        found = {
            "title": self.title,
            "verdicts": self.verdicts(),
            "findings": [{"claim": c, "seen": s, "evidence": e} for c, s, e in self.findings],
            "failures": self.failures,
        }
        atomic_write_text(self.folder / "findings.json", json.dumps(found, indent=1) + "\n")
        return self.folder / "report.md"


def _joined(lines: Sequence[str]) -> str:
    """Paragraphs apart, items of a list together."""
    text = ""
    for before, line in zip(["", *lines], lines, strict=False):
        text += ("\n" if before.startswith("* ") and line.startswith("* ") else "\n\n" if text else "") + line
    return text + "\n"


def _write_csv(file: Path, rows: Rows) -> None:
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _markdown(rows: Rows) -> str:
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
