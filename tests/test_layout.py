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
    *("cli", "train", "plan", "analysis", "evaluate", "deltas", "methods", "engine", "select", "subspaces"),
    *("models", "data", "kernels", "common"),
)


def modules() -> list[tuple[str, Path]]:
    """(layer, file) of every module inside a layer."""
    ours = [(path.relative_to(ROOT / "jaxsparse").parts[0], path) for path in (ROOT / "jaxsparse").glob("*/**/*.py")]
    return ours + [("kernels", path) for path in (ROOT / "kernels").rglob("*.py")]


def imported_layers(path: Path) -> set[str]:
    """Layers that a module imports from, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert node.level == 0, f"{path}: relative import"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("jaxsparse.")}
    return found


def test_imports_go_downwards_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for layer, path in modules()
        for other in imported_layers(path)
        if other in LAYERS and LAYERS.index(other) < LAYERS.index(layer)
    ]
    assert not wrong, "\n".join(wrong)


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
