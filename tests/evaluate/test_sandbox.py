"""Programs in a process of their own: what counts as the end, and what they cannot do."""

import time
from pathlib import Path

import pytest

from jaxsparse.evaluate.sandbox import runs_to_its_end


def runs(program: str, seconds: float = 10.0) -> bool:
    return runs_to_its_end(program, seconds=seconds, memory=2**30)


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ",
        "open('a', 'w').write('x')\nimport os\nos.mkdir('b')\nos.rename('a', 'b/c')\nos.remove('b/c')",
        "import tempfile\ntempfile.NamedTemporaryFile()",
        "assert __name__ == '__main__'\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nassert f(10) == 55",
        "print('x' * 10**6)\nimport sys\nassert sys.stdin.read() == ''",
        "import numpy",
    ],
)
def test_an_honest_program_runs(program: str) -> None:
    assert runs(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "f(",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
        "x = bytearray(2**34)",
        "x = [0]\nwhile True: x += x",
        "open('large', 'wb').write(bytes(2**24))",
        "files = [open(f'{n}', 'w') for n in range(100)]",
        "import os\nos.fork()",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.system('true')",
        "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)",
    ],
)
def test_a_program_that_is_stopped_or_leaves_early_does_not_come_to_its_end(program: str) -> None:
    assert not runs(program)


def test_nothing_lands_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").write_text("kept")
    for attempt in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"import os\nos.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os\nos.remove({str(tmp_path / 'kept')!r})",
        f"import os\nos.rename({str(tmp_path / 'kept')!r}, 'mine')",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('link/new', 'w')",
        f"import pathlib\npathlib.Path({str(tmp_path / 'folder')!r}).mkdir()",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
    ):
        assert not runs(attempt), attempt
    assert runs("open('here', 'w').write('x')")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"


def test_time_ends_a_program() -> None:
    start = time.monotonic()
    assert not runs("while True: pass", seconds=1.0)
    assert not runs("import time\ntime.sleep(1000)", seconds=1.0)
    assert time.monotonic() - start < 60


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    # multiprocessing starts processes by a way that no audit hook sees.
    left = f"import time\nwhile True: time.sleep(0.02); open({str(tmp_path / 'alive')!r}, 'w').write(str(time.time()))"
    start = (
        "import sys, time\nfrom multiprocessing import util\n"
        f"util.spawnv_passfds(sys.executable.encode(), [b'python', b'-c', {left!r}.encode()], [])\n"
    )
    for ending, seconds in (("time.sleep(1.0)", 10.0), ("time.sleep(1000)", 1.5)):
        runs(start + ending, seconds=seconds)
        marks = []
        for _ in range(2):
            marks.append((tmp_path / "alive").read_text() if (tmp_path / "alive").exists() else None)
            time.sleep(0.3)
        assert marks[0] == marks[1]
