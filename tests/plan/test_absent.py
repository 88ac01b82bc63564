"""Plans for a device that is not here."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.plan import compile_for
from jaxsparse.plan.absent import DEVICES

SHAPE = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)


def test_peak_memory_counts_donated_arguments_once() -> None:
    try:
        kept = compile_for("h100", lambda x: x + 1, [SHAPE])
    except InputError as error:
        pytest.skip(str(error))
    donated = compile_for("h100", lambda x: x + 1, [SHAPE], donate=(0,))
    assert kept.argument_bytes == donated.argument_bytes == 4 * 2**20
    assert kept.peak_bytes >= 8 * 2**20
    assert donated.peak_bytes < 5 * 2**20


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(InputError, match="'h1000' is unknown; known: h100, v5e, v5p, cpu, or several as h100x8"):
        compile_for("h1000", jnp.sin, [SHAPE])


def test_without_the_plugin_the_error_says_what_to_install() -> None:
    if "jax_plugins.xla_cuda13" in sys.modules:
        pytest.skip("the plugin is there")
    with pytest.raises(InputError, match=r"pip install --no-deps jax-cuda13-plugin==.*JAX_PLATFORMS=cpu"):
        compile_for("h100", jnp.sin, [SHAPE])


@pytest.mark.parametrize("device", ["v5e", "v5p"])
def test_one_chip_of_a_tpu_can_be_compiled_for(device: str) -> None:
    try:
        plan = compile_for(device, lambda x: x @ x, [SHAPE])
    except InputError as error:
        pytest.skip(str(error))
    assert plan.argument_bytes == 4 * 2**20
    assert plan.compiled.cost_analysis()["flops"] == 2 * 1024**3


def test_without_the_tpu_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps 'libtpu==.*JAX_PLATFORMS=cpu"):
        compile_for("v5e", jnp.sin, [SHAPE])


def test_the_description_is_the_one_that_was_tried(shared: Path) -> None:
    words = lambda text: sorted(text.replace("{", " { ").split())  # noqa: E731
    assert words(DEVICES["h100"].target_config()) == words((shared / "targets/h100_80gb.txtpb").read_text())


def test_a_container_may_take_less_memory_than_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version_2, version_1 = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr("jaxsparse.plan.absent._CONTAINER_LIMITS", (version_2, version_1))
    whole = DEVICES["cpu"].memory
    version_2.write_text("max\n")
    version_1.write_text(f"{2**62}\n")
    assert DEVICES["cpu"].memory == whole > 2**20
    version_2.write_text(f"{2**20}\n")
    assert DEVICES["cpu"].memory == 2**20
    version_1.write_text(f"{2**19}\n")
    assert DEVICES["cpu"].memory == 2**19
