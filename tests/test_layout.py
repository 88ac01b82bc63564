"""The house: imports go downwards only, every package is installed, and no machine's paths are tracked."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# DESIGN.md, "The house", from the top down; `common` serves all, kernels depend on jax alone.
LAYERS = (
    *("cli", "train", "plan", "analysis", "evaluate", "methods", "engine", "deltas", "select", "subspaces"),
    *("models", "data", "kernels", "common"),
)


def modules() -> list[tuple[str, Path]]:
    """(layer, file) of every module inside a layer."""
    ours = [(path.relative_to(ROOT / "jaxsparse").parts[0], path) for path in (ROOT / "jaxsparse").glob("*/**/*.py")]
    return ours + [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]


def imported_layers(source: str) -> set[str]:
    """Layers that a module imports from, at its top or inside functions; "" for the package as a whole."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.append("jaxsparse")  # a relative import hides its layer
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [[*name.split("."), ""] for name in names]
    return {part[1] if part[1] in LAYERS else "" for part in parts if part[0] == "jaxsparse"}


def test_imports_go_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other or 'jaxsparse as a whole'}"
        for layer, path in modules()
        for other in imported_layers(path.read_text())
        if not other or LAYERS.index(other) < LAYERS.index(layer)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "layers"),
    [
        ("import jaxsparse as js", {""}),
        ("def f():\n    import jaxsparse", {""}),
        ("from jaxsparse import gasdu", {""}),
        ("from . import gasdu", {""}),
        ("from .tuner import step", {""}),
        ("from jaxsparse import deltas", {"deltas"}),
        ("import jaxsparse.train.loop", {"train"}),
        ("from jaxsparse.cli.main import main", {"cli"}),
        ('"""\n>>> import jaxsparse as js\n"""\nimport jax', set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, layers: set[str]) -> None:
    assert imported_layers(source) == layers


def test_every_layer_has_its_place() -> None:
    folders = {path.name for path in (ROOT / "jaxsparse").iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(LAYERS)


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    inside = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "jaxsparse").rglob("__init__.py")}
    kernels = {
        ".".join(("jaxsparse", *init.parent.relative_to(ROOT).parts))
        for init in (ROOT / "kernels").rglob("__init__.py")
    }
    assert listed == inside | kernels


def test_files_are_short_enough_to_read_at_a_sitting() -> None:
    long = {str(path.relative_to(ROOT)): n for _, path in modules() if (n := path.read_text().count("\n")) > 450}
    assert not long


def test_no_path_of_one_machine_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(^|[^A-Za-z0-9_.~-])/(work|tmp|farm|root|home)/", re.MULTILINE)
    texts = {
        name: (ROOT / name).read_bytes().decode("utf-8", "ignore")
        for name in listed.stdout.split()
        if (ROOT / name).is_file()
    }
    assert not [name for name, text in texts.items() if name != "tests/test_layout.py" and machine.search(text)]
