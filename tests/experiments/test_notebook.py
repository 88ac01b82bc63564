"""The quickstart notebook runs from top to bottom and shows what it says; it is committed without outputs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments/notebooks/quickstart.ipynb"
# What the cells are asked after they have run, in their own namespace.
QUESTIONS = """
import numpy as np
from jaxsparse.common.paths import flatten_with_paths

for (path, one), other in zip(flatten_with_paths(base)[0], map(np.asarray, jax.tree.leaves(reverted)), strict=True):
    assert np.asarray(one).tobytes() == other.tobytes(), path
assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (base, tuned)), strict=True))
assert len(history) == len(fixed_history) == len(gasdu_history) == STEPS
assert all(0 < step["retention"] <= 1 for step in history + fixed_history + gasdu_history)
assert [step["refreshed"] for step in history] == [number % REFRESH_EVERY == 0 for number in range(STEPS)]
assert [step["refreshed"] for step in fixed_history] == [number == 0 for number in range(STEPS)]
assert np.allclose([step["loss"] for step in history], [step["loss"] for step in gasdu_history], rtol=1e-3)
assert all(panel.get_xlabel() or panel is upper for panel in (upper, lower))
assert all(panel.get_ylabel() for panel in (upper, lower))
print("answered")
"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def small(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, and an environment that asks for a tiny model and little of it."""
    for name, value in {
        "MODEL": str(tiny_model),
        "PLANNED_MODEL": str(tiny_model),
        "PLANNED_DEVICES": "h100 v5e",
        "PLANNED_METHODS": "gasdu",
        "STEPS": "6",
        "OUT": str(tmp_path / "out"),
    }.items():
        monkeypatch.setenv(f"JAXSPARSE_NOTEBOOK_{name}", value)
    # Without the TPU's compiler: that it says what to install can be seen.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if Path(path).name != "tpu"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def texts(cell: nbformat.NotebookNode) -> str:
    """What a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(notebook: nbformat.NotebookNode, small: Path) -> None:
    notebook.cells.append(nbformat.v4.new_code_cell(QUESTIONS, id="questions"))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(small)}}).execute()
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert "answered" in texts(cells["questions"])

    assert texts(cells["install"]) == ""  # it is there already
    assert re.search(r"held-out loss \d+\.\d{3} -> \d+\.\d{3}", texts(cells["train"]))
    assert re.search(r"devices +\[CpuDevice", texts(cells["device"]))
    assert re.search(r"tokens/s +[1-9]", texts(cells["device"]))
    assert any("image/png" in output.get("data", ()) for output in cells["retention"].outputs)
    assert (small / "out/gasdu.safetensors").is_file()
    for name in ("delta-revert", "switch"):
        assert "True" in texts(cells[name])
        assert "False" not in texts(cells[name])
    h100, v5e = re.search(r"(.*)(jaxsparse plan: compiling for v5e.*)", texts(cells["plan"]), re.DOTALL).groups()
    assert re.search(r"gasdu +\d+\.\d\d of 79 GB", h100) or "pip install --no-deps jax-cuda13-plugin" in h100
    assert "pip install --no-deps 'libtpu" in v5e


def test_it_holds_no_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 0 < len(code) <= 15
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]


@pytest.mark.parametrize("check", [("check",), ("format", "--check")])
def test_its_cells_are_clean(check: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "ruff", *check, "--no-cache", str(NOTEBOOK)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not ran.returncode, ran.stdout + ran.stderr
