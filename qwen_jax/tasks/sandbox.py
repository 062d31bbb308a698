"""Runs a program that nobody has read: a process of its own, with limits and little to reach.

In force, or `run` raises: time, memory, size of a file, open files; no other programs, no network,
no signals and no tracing (a seccomp filter). `describe` says what else the kernel gives: a network
namespace without interfaces, and Landlock, which leaves a temporary folder to write in and Python
and the system's libraries to read.

Not sandboxed: the kernel itself, processor caches and time; the number of files written, up to the
disk's size, within the time allowed; all files that the user can read or write, where there is no
Landlock. A program can also find out what its judge expects and claim it: this protects the
machine, not the score. Run evaluations in a container or a virtual machine that may be lost.
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

from qwen_jax.tasks import jail

_JAIL = Path(jail.__file__)
_STARTUP = 10.0  # seconds for the interpreter and the jail, on a machine that is busy
_SHOWN = 2000  # bytes of the program's output that are kept


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. `isolation="limits"` does without the seccomp filter, for systems
    that have none: time and sizes only, and the program reaches all that its user does."""

    seconds: float = 5.0  # of the wall's clock, and of the processor
    memory: int = 2 * 2**30  # bytes of address space
    file_size: int = 2**24  # bytes of one file, output included
    open_files: int = 64
    isolation: Literal["full", "limits"] = "full"

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "file_size", "open_files"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.isolation not in ("full", "limits"):
            raise ValueError(f"isolation={self.isolation!r} is unknown; known: full, limits")


@dataclass(frozen=True)
class Outcome:
    """passed: ran to its end. failed: raised, or ended otherwise. timeout: was stopped."""

    status: Literal["passed", "failed", "timeout"]
    detail: str  # the exception, or how it ended
    output: str  # the beginning of what it printed


def run(program: str, *, limits: Limits) -> Outcome:
    """Runs Python source in a folder of its own, which is deleted afterwards.

    Raises `ValueError` where the jail cannot be set up: then nothing has been run.
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
            said = report.read(2**16).decode("utf-8", "replace")
        output = _beginning(work / jail.OUTPUT)
    return _outcome(said, nonce, status, limits, output)


def _execute(order: str, work: Path, report: int, limits: Limits) -> int | None:
    """The exit status, negative for a signal; None where time was up."""
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
        # The jail stops the program by itself after `seconds`; this is for what stops the jail.
        process.communicate(order.encode(), timeout=limits.seconds + _STARTUP)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # What the program may have started is of the same session; a full jail lets it start none.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def _outcome(said: str, nonce: str, status: int | None, limits: Limits, output: str) -> Outcome:
    lines = [line.split(" ", 2) for line in said.splitlines()]
    mine = [line[1:] for line in lines if line[0] == nonce and len(line) == 3]
    verdicts = dict(mine)
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


def _beginning(path: Path) -> str:
    # The program may have put anything in the place of its output: a link, a folder, a pipe.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read(_SHOWN).decode("utf-8", "replace")
        except OSError:
            return ""


@functools.cache
def describe(limits: Limits) -> dict[str, str | float]:
    """What is in force on this machine, as a program in the jail finds it.

    Raises `ValueError` where the jail cannot be set up.
    """
    outcome = run(_PROBE, limits=limits)
    if outcome.status != "passed":
        raise ValueError(f"the jail does not run a trivial program: {outcome.detail}")
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
