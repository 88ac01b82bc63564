"""Programs of unknown worth, run in a Python process of their own with limits."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile

__all__ = ["runs_to_its_end"]

# Runs in the child. Limits itself for good, hides what a program has no use for, and tells the parent the password once
# the program has come to its end: a status of 0 says nothing, since a program may exit before it is tested.
_GUARD = r"""
import json, os, resource, sys, tempfile

request = json.load(sys.stdin)
# Not every system has, or lets one set, every limit.
for name, most in request["limits"].items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (AttributeError, OSError, ValueError):
        pass

os.environ.clear()  # of what Python itself puts there
answer = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)

own = tempfile.tempdir = os.path.realpath(os.getcwd())
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = {
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.kill", "os.killpg",
    "subprocess.Popen", "pty.spawn", "signal.pthread_kill",
}
CHANGING = {
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
    "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move",
}


def inside(path):
    if isinstance(path, int):
        return True
    place = os.path.realpath(os.fsdecode(path))
    return place == own or place.startswith(own + os.sep)


def hook(event, arguments):
    if event in REFUSED or event.startswith("socket.") and event != "socket.gethostname":
        raise PermissionError(event + " is not for programs under test")
    if event == "open" and arguments[0] is not None and arguments[2] & WRITING:
        outside = not inside(arguments[0]) and os.fsdecode(arguments[0]) != os.devnull
    elif event in CHANGING:
        outside = not all(inside(each) for each in arguments if isinstance(each, (str, bytes, os.PathLike)))
    else:
        return
    if outside:
        raise PermissionError("a program under test writes in its own folder only")


for name in ("setsid", "setpgid", "setpgrp"):  # they lead out of the session that is killed
    for module in (os, sys.modules["posix"]):
        if hasattr(module, name):
            delattr(module, name)

end, password = os.write, request["password"].encode()
code = compile(request["program"], "program.py", "exec")
request = None
sys.addaudithook(hook)
exec(code, {"__name__": "__main__"})
end(answer, password)
"""


def runs_to_its_end(program: str, *, seconds: float, memory: int) -> bool:
    """Runs a Python program in a process of its own, and returns whether it came to its last line.

    The process has an empty folder of its own, none of our environment, no standard streams, and limits on time,
    memory, sizes of files, open files and (unless it runs as root) processes. Python's audit hooks refuse it other
    processes, signals, the network, and writing outside its folder. When it ends, or its time is up, what it has
    started is killed.

    That stops accidents, not malice: it is the same user on the same machine, may read every file that the user may,
    and native code or a way around the hooks may do all the rest. Give programs that somebody may have made to harm to
    a container or a virtual machine.

    Args:
        program: the source; to leave early, even with status 0, is not to come to its end.
        seconds: of processor time and of the clock.
        memory: bytes of address space (Linux).

    Returns:
        Whether no exception, limit or exit stopped it.
    """
    password = secrets.token_hex(16)
    limits = {"CPU": max(1, round(seconds)), "AS": memory, "FSIZE": 2**20, "NOFILE": 64, "NPROC": 0, "CORE": 0}
    request = json.dumps({"program": program, "password": password, "limits": limits}).encode()
    # What a program made unreadable may stay: that is no reason to fail.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _GUARD],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(request)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
        finally:
            _kill_session(process)
        with process.stdout as stdout:
            # Whoever still holds the other end keeps nobody waiting.
            os.set_blocking(stdout.fileno(), False)
            return (stdout.read(len(password)) or b"") == password.encode()


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, and started nothing that is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
