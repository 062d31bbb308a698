"""What a program in the jail can and cannot do."""

import textwrap

import pytest

from qwen_jax.tasks.sandbox import sandbox

LIMITS = sandbox.Limits(seconds=2.0)
QUICK = sandbox.Limits(seconds=0.5)


def run(program: str, limits: sandbox.Limits = LIMITS) -> sandbox.Outcome:
    return sandbox.run(textwrap.dedent(program), limits=limits)


def test_a_program_that_ends_has_passed():
    outcome = run("print('said'); open('own', 'w').write('x'); assert open('own').read() == 'x'")
    assert (outcome.status, outcome.output) == ("passed", "said\n")


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended with status 0 before"),
        ("import os; os.abort()", "ended with status -"),
        ("raise ValueError('\\ud800')", "ValueError"),
        ("bytearray(3 * 2**30)", "MemoryError"),
        ("open('large', 'wb').write(bytes(2**25))", "File too large"),
        ("while True: print('x' * 4096)", "File too large"),
        ("files = [open('f', 'w') for _ in range(100)]; input()", "Too many open files"),
        ("input()", "EOFError"),
    ],
)
def test_a_program_that_does_not_has_failed(program, detail):
    outcome = run(program)
    assert outcome.status == "failed" and detail in outcome.detail, outcome


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 22))",
        "import os; os.fork()",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(1, 0)",
        "import os; os.setpriority(os.PRIO_PROCESS, 0, 5)",
        "import resource; resource.prlimit(1, resource.RLIMIT_CPU)",
    ],
)
@pytest.mark.races
def test_network_processes_and_signals_are_out_of_reach(program):
    outcome = run(program)
    assert outcome.status == "failed" and "PermissionError" in outcome.detail, outcome


def test_limits_cannot_be_raised():
    outcome = run("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))")
    assert outcome.status == "failed" and "maximum limit" in outcome.detail


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
@pytest.mark.races
def test_time_is_up(program):
    assert run(program, QUICK).status == "timeout"


def test_threads_and_libraries_are_there():
    outcome = run("""
        import threading, heapq, re, math, random, tempfile
        found = []
        thread = threading.Thread(target=found.append, args=[1])
        thread.start(); thread.join()
        assert found == [1] and random.SystemRandom().random() < 1
        with tempfile.TemporaryFile() as file:
            file.write(b'x')
    """)
    assert outcome.status == "passed", outcome


def test_files_elsewhere_are_out_of_reach(tmp_path):
    found = sandbox.describe(LIMITS)
    assert (found["network"], found["programs"]) == ("no", "no")
    if found["files_outside_written"] == "yes":
        pytest.skip("this kernel has no Landlock")
    secret = tmp_path / "secret"
    secret.write_text("hidden")
    assert "PermissionError" in run(f"open({str(secret)!r}).read()").detail
    assert "PermissionError" in run(f"open({str(tmp_path / 'new')!r}, 'w')").detail
    assert secret.read_text() == "hidden" and list(tmp_path.iterdir()) == [secret]
    link = run(f"import os; os.remove('printed.txt'); os.symlink({str(secret)!r}, 'printed.txt')")
    assert (link.status, link.output) == ("passed", ""), "the judge does not follow links either"


def test_limits_alone_are_what_they_say():
    limits = sandbox.Limits(seconds=2.0, isolation="limits")
    assert sandbox.describe(limits)["network"] == "yes"
    assert run("bytearray(3 * 2**30)", limits).status == "failed"


@pytest.mark.parametrize(
    ("values", "message"),
    [({"seconds": 0}, "seconds=0"), ({"memory": -1}, "memory=-1"), ({"isolation": "no"}, "'no'")],
)
def test_limits_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        sandbox.Limits(**values)


def test_a_jail_that_cannot_be_built_runs_nothing(monkeypatch, tmp_path):
    jail = (sandbox._JAIL).read_text().replace("def _isolate() -> None:", (
        "def _isolate() -> None:\n    raise OSError(1, 'no filter here')\n"))  # fmt: skip
    (tmp_path / "jail.py").write_text(jail)
    monkeypatch.setattr(sandbox, "_JAIL", tmp_path / "jail.py")
    with pytest.raises(ValueError, match="cannot be jailed here: PermissionError.*no filter"):
        run("open('/proc/self/nothing')")
