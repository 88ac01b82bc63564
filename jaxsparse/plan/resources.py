"""What a function's kernels take of a GPU that is not here: registers, spills and shared memory."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.plan.absent import DEVICES, Gpu, Plan, compile_for

__all__ = ["GpuKernel", "gpu_kernels"]

# A line of XLA's list of what it launches: name, programs, threads, and what they ask for when they are launched.
_LAUNCH = re.compile(
    r"kCustomKernel .*?\] +(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), .*shared_memory: (\d+) bytes"
)
# Where optimised HLO names the Pallas kernel that an operation is.
_PALLAS = re.compile(r'op_name="[^"]*?([^"/]+)/pallas_call')
# What ptxas -v says of a kernel.
_ASSEMBLED = re.compile(
    r"entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class GpuKernel:
    """A kernel, as it is launched.

    Attributes:
        name: its name.
        programs: how many run, a block of threads each.
        threads: of a program.
        registers: of a thread.
        spilled_bytes: what a thread moves to local memory and back since it has no registers left.
        shared_bytes: shared memory of a program.
    """

    name: str
    programs: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def gpu_kernels(
    device: str, function: Callable[..., Any], arguments: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> tuple[Plan, list[GpuKernel]]:
    """Compiles a function for a GPU that is not here, and looks at its Pallas kernels.

    Args:
        device: the name of a GPU in `DEVICES`.
        function: what to compile.
        arguments: its arguments; arrays, or their shapes.
        options: of XLA's compiler.

    Returns:
        The plan, and the Pallas kernels, without those that XLA makes, in the order in which they are launched.

    Raises:
        InputError: the device is no GPU, or what compiles for it is not installed.
    """
    gpu = DEVICES.get(device)
    if gpu is not None and not isinstance(gpu, Gpu):
        raise InputError(f"device {device!r} is no GPU")
    with tempfile.TemporaryDirectory() as folder:
        plan = compile_for(device, function, arguments, options={"xla_dump_to": folder, **(options or {})})
        assert gpu is not None
        ours = set(_PALLAS.findall(plan.compiled.as_text()))
        lines = "\n".join(file.read_text() for file in Path(folder).glob("*thunk_sequence.txt"))
        # XLA numbers kernels of one name: name, name__1, name__2.
        launches = [launch for launch in _LAUNCH.findall(lines) if launch[0].partition("__")[0] in ours]
        names = [launch[0] for launch in launches]
        assembled: dict[str, tuple[int, int, int]] = {}
        for ptx in Path(folder).glob("*.ptx"):
            text = ptx.read_text()
            if any(f".entry {name}(" in text for name in names):
                assembled.update(_assemble(ptx, gpu.capability))
    return plan, [
        GpuKernel(name, int(x) * int(y) * int(z), int(threads), registers, spilled, static + int(dynamic))
        for name, x, y, z, threads, dynamic in launches
        for registers, spilled, static in [assembled[name]]
    ]


def _assemble(ptx: Path, capability: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and static shared memory, by kernel."""
    architecture = f"sm_{capability[0]}{capability[1]}a"
    command = [_ptxas(), "-v", f"-arch={architecture}", str(ptx), "-o", str(ptx.with_suffix(".cubin"))]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = {}
    for name, stores, loads, registers, rest in _ASSEMBLED.findall(said):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = int(registers), int(stores) + int(loads), int(shared[1]) if shared else 0
    return found


def _ptxas() -> str:
    """NVIDIA's assembler: of the wheel, or on the path."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = list(nvidia.submodule_search_locations or ()) if nvidia else []
    wheels = [str(file) for folder in folders for file in sorted(Path(folder).glob("*/bin/ptxas"))]
    found = [*wheels, shutil.which("ptxas")]
    if found[0] is None:
        raise InputError("resources of GPU kernels need ptxas: pip install --no-deps 'nvidia-cuda-nvcc>=13.0,<13.1'")
    return found[0]
