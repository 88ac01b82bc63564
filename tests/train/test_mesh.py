"""`jaxsparse finetune --mesh` on eight virtual devices: the run of one device, also where another mesh goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsparse.cli.main import main
from tests.cli.test_errors import fails
from tests.train.runs import arguments, finetune, metrics_of, weights

DEVICES = 8
OPTIONS = {"steps": 6, "checkpoint-every": 3, "keep-checkpoints": 9, "refresh-every": 2, "density": 0.02}


def on_mesh(model: Path, problems: dict[str, Path], out: Path, mesh: str, *flags: str) -> None:
    """Fine-tunes in a process with eight virtual devices."""
    command = [sys.executable, "-m", "jaxsparse.cli.main", "finetune", "--mesh", mesh, *flags]
    command += arguments(model, problems, out, **OPTIONS)
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    done = subprocess.run(command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "running on the reference engine" not in done.stderr


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(out)]


@pytest.mark.slow
def test_a_run_on_a_mesh_is_that_of_one_device_and_goes_on_on_another(
    tiny_model: Path, problems: dict[str, Path], tmp_path: Path
) -> None:
    assert finetune(tiny_model, problems, tmp_path / "alone", **OPTIONS) == 0
    flags = ["--selection", "global"]
    on_mesh(tiny_model, problems, tmp_path / "mesh", "data=2,fsdp=2,tensor=2", *flags)
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "alone"), rtol=1e-4)
    report = json.loads((tmp_path / "mesh" / "report.json").read_text())
    assert report["bit_identical"]
    assert report["engine"] == "fused"

    # As if it had been killed after the first checkpoint.
    shutil.copytree(tmp_path / "mesh", tmp_path / "other")
    for name in ("report.json", "delta"):
        path = tmp_path / "other" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    on_mesh(tiny_model, problems, tmp_path / "other", "fsdp=4,tensor=2", *flags, "--resume")
    np.testing.assert_allclose(losses(tmp_path / "other"), losses(tmp_path / "alone"), rtol=1e-4)
    tuned = [weights(tiny_model, tmp_path / name / "delta") for name in ("alone", "mesh", "other")]
    for path, leaf in tuned[0].items():
        for other in tuned[1:]:
            np.testing.assert_allclose(other[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "model=8"], "mesh axis 'model' is unknown; a mesh is written as data=2,fsdp=4,tensor=1"),
        (["--mesh", "data=two"], "data must be given once, as a positive number, got 'data=two'"),
        (["--mesh", "data=2,data=2"], "data must be given once"),
        (["--mesh", "data=3"], "has 3 devices, but there are"),
    ],
)
def test_bad_meshes_end_in_one_line(
    flags: list[str],
    message: str,
    tiny_model: Path,
    problems: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    assert message in fails(["finetune", *arguments(tiny_model, problems, out, steps=1), *flags], capsys)
    assert not out.exists()


def test_one_device_is_a_mesh_too(tiny_model: Path, problems: dict[str, Path], tmp_path: Path) -> None:
    flags = arguments(tiny_model, problems, tmp_path / "run", **{**OPTIONS, "steps": 2})
    assert main(["finetune", *flags, "--mesh", "data=1"]) == 0
