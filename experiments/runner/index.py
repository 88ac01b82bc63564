"""The page that links every report."""

import html
import json
from pathlib import Path

from markdown_it import MarkdownIt

from jaxsparse.common.files import atomic_write_text

__all__ = ["write_index", "write_pages"]

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2em .6em}img{max-width:100%}pre{overflow:auto;background:#f6f6f6;padding:1em}"
)


def write_pages(file: Path, text: str) -> None:
    """Writes a page as Markdown, and beside it as HTML for a browser."""
    atomic_write_text(file, text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    title = html.escape(text.partition("\n")[0].removeprefix("# "))
    page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>{body}'
    atomic_write_text(file.with_suffix(".html"), page)


def write_index(out: Path) -> Path:
    """Writes `index.md` and `index.html`: every experiment that has a report, with its findings.

    Args:
        out: the folder under which the reports lie.
    """
    lines = [f"# Experiments, {out.name} scale"]
    for file in sorted(out.glob("*/*/findings.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        name = file.parent.relative_to(out)
        lines.append(f"## [{found['title']}]({name}/report.md)")
        lines += ["\n".join(f"* {verdict}" for verdict in found["verdicts"]) or "* nothing found"]
        if found["failures"]:
            lines.append(f"{len(found['failures'])} of its parts failed; the report says which.")
        pictures = sorted(file.parent.glob("*.png"))
        lines += [f"![{picture.stem}]({name}/{picture.name})" for picture in pictures[:1]]
    text = "\n\n".join(lines) + "\n"
    write_pages(out / "index.md", text)
    # In a browser the links lead to the pages for browsers.
    page = out / "index.html"
    atomic_write_text(page, page.read_text(encoding="utf-8").replace("report.md", "report.html"))
    return out / "index.md"
