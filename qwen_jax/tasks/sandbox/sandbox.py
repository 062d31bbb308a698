"""The sandbox: runs an untrusted Python program in a process with limits and few permissions.

Always in force, or `run` raises: limits on time, memory, file size and open files, and a seccomp
filter against other programs, the network, signals and tracing. `describe` reports the rest, which
depends on the kernel: a network namespace without interfaces, and Landlock, under which the program
can only write to a temporary folder and only read Python and the system's libraries.

Not sandboxed: the kernel itself, processor caches and timing; the number of files that a program
writes within its time; without Landlock, every file that the user can read or write. A program can
also find out what its grader expects and claim it: the sandbox protects the machine, not the score.
Run evaluations in a container or a virtual machine that may be lost.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_jax.tasks.sandbox import jail

_JAIL = Path(jail.__file__)
_STARTUP_SECONDS = 10.0  # to start the interpreter and the jail on a busy machine
_OUTPUT_BYTES = 2000  # of the program's output that are kept


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources that a program may use.

    `isolation="limits"` does without the seccomp filter, for systems that have none: only time and
    sizes are limited, and the program can do whatever its user can.
    """

    seconds: float = 5.0  # of wall time, and of processor time
    memory: int = 2 * 2**30  # bytes of address space
    file_size: int = 2**24  # bytes of one file, output included
    open_files: int = 64
    isolation: Literal["full", "limits"] = "full"

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "file_size", "open_files"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0; raise it")
        if self.isolation not in ("full", "limits"):
            raise ValueError(f"isolation={self.isolation!r} is unknown; known: full, limits")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program: it ran to its end, raised or exited, or was stopped."""

    status: Literal["passed", "failed", "timeout"]
    detail: str  # the exception or the exit status; empty for a program that passed
    output: str  # the beginning of what it printed


def run(program: str, *, limits: Limits) -> Outcome:
    """Runs Python source in a temporary folder and returns its outcome.

    Raises `ValueError` where the sandbox cannot be set up; the program has then not been run.
    """
    with tempfile.TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        with open(Path(folder) / "report", "w+b") as report:  # noqa: PTH123 (its number is passed)
            nonce = secrets.token_hex(16)
            order = {
                "program": program, "nonce": nonce, "report": report.fileno(),
                **dataclasses.asdict(limits),
            }  # fmt: skip
            status = _execute(json.dumps(order), work, report.fileno(), limits)
            report.seek(0)
            lines = report.read(2**16).decode("utf-8", "replace")
        output = _read_beginning(work / jail.OUTPUT)
    return _outcome(lines, nonce, status, limits, output)


def _execute(order: str, work: Path, report: int, limits: Limits) -> int | None:
    """The exit status of the jail, negative for a signal; None where it had to be stopped."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=work,
        env={"HOME": str(work), "TMPDIR": str(work), "PYTHONHASHSEED": "0", "LANG": "C.UTF-8",
             "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        pass_fds=[report],
        start_new_session=True,
    )  # fmt: skip
    try:
        # The jail stops the program after `seconds`; this limit is for a jail that hangs itself.
        process.communicate(order.encode(), timeout=limits.seconds + _STARTUP_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Processes that the program started are in its session; only isolation=limits allows any.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def _outcome(report: str, nonce: str, status: int | None, limits: Limits, output: str) -> Outcome:
    """The outcome by the jail's report; lines without the nonce are the program's forgeries."""
    lines = [line.split(" ", 2) for line in report.splitlines()]
    verdicts = dict(line[1:] for line in lines if line[0] == nonce and len(line) == 3)
    if "refused" in verdicts:
        raise ValueError(
            f"programs cannot be jailed here: {verdicts['refused']}; run in a Linux container or "
            f"machine with seccomp, or, where programs may do whatever you may, with "
            f"isolation=limits"
        )
    if "passed" in verdicts:
        return Outcome("passed", "", output)
    if "failed" in verdicts:
        return Outcome("failed", verdicts["failed"], output)
    if status is None or status in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("timeout", f"more than {limits.seconds} s", output)
    return Outcome("failed", f"ended with status {status} before its tests did", output)


def _read_beginning(path: Path) -> str:
    """The first bytes of the program's output; empty where it is no regular file."""
    # The program may have replaced its output by a link, a folder or a pipe.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read(_OUTPUT_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""


@functools.cache
def describe(limits: Limits) -> dict[str, str | float]:
    """The limits and what a program in the sandbox can reach on this machine, for the record.

    Raises `ValueError` where the sandbox cannot be set up.
    """
    outcome = run(_PROBE, limits=limits)
    if outcome.status != "passed":
        raise ValueError(
            f"the sandbox does not run a trivial program: {outcome.detail}; raise its limits "
            f"({limits})"
        )
    return {**dataclasses.asdict(limits), **json.loads(outcome.output)}


_PROBE = """
import json, os
def allowed(action):
    try:
        action()
    except OSError:
        return "no"
    return "yes"
def connect():
    import socket
    socket.socket().close()
def start():
    import subprocess, sys
    subprocess.run([sys.executable, "-c", ""], check=True)
def read():
    os.listdir("/")
def write():
    import tempfile
    tempfile.TemporaryFile(dir=os.path.dirname(os.getcwd())).close()
print(json.dumps({"network": allowed(connect), "programs": allowed(start),
                  "files_of_others_read": allowed(read), "files_outside_written": allowed(write)}))
"""
