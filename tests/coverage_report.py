"""Prints the lines covered by tests, per file, and fails if a public function is never entered.

Usage: python -m tests.coverage_report [pytest arguments]; `make coverage` runs it over the whole suite.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def public_functions(path: Path) -> list[tuple[str, set[int]]]:
    """(name, lines that only a call executes) of public functions and of public methods of public classes."""
    found = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                code = [part for part in node.body if not _is_docstring(part)]
                # A protocol's methods have no code, and those of a base class may only say that they are to be made.
                if any(not isinstance(part, ast.Raise) for part in code):
                    # Importing executes the line of a `def`: whether a body on that line ran cannot be told.
                    lines = set(range(code[0].lineno, (node.end_lineno or node.lineno) + 1)) - {node.lineno}
                    found.append((prefix + node.name, lines))

    visit(ast.parse(path.read_text()).body, "")
    return found


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def main(arguments: list[str]) -> int:
    """Runs the tests under coverage and reports."""
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "erase"], cwd=ROOT, check=True)  # what an earlier run entered does not count
    # One process: the counting of lines does not mix with pytest-xdist.
    tests = subprocess.run([*coverage, "run", "-m", "pytest", "-q", *arguments], cwd=ROOT, check=False)
    subprocess.run([*coverage, "combine", "-q"], cwd=ROOT, check=False)
    subprocess.run([*coverage, "json", "-q", "-o", "coverage.json"], cwd=ROOT, check=True)
    report = json.loads((ROOT / "coverage.json").read_text())
    uncovered = []
    for name, file in sorted(report["files"].items()):
        summary = file["summary"]
        print(
            f"{summary['percent_covered']:6.1f} %  {summary['covered_lines']:5}/{summary['num_statements']:<5} {name}"
        )
        executed = set(file["executed_lines"])
        for function, lines in public_functions(ROOT / name):
            if not executed & lines:
                uncovered.append(f"{name}: {function}")
    totals = report["totals"]
    print(f"{totals['percent_covered']:6.1f} %  {totals['covered_lines']:5}/{totals['num_statements']:<5} in all")
    print(
        "\n".join(["public functions that no test enters:", *uncovered])
        if uncovered
        else "all public functions are covered"
    )
    return int(bool(uncovered) or tests.returncode != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
