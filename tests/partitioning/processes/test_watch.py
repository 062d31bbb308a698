"""Processes that wait for each other, and what each says when one does not come, goes, or stops."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partitioning.processes import watch

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys, time
from partitioning.processes import watch
watch._GRACE_SECONDS = 0.5
address, process, count, script = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
try:
    w = watch.call_roll(
        address, process_id=process, num_processes=count, seconds=PATIENCE, silence=SILENCE
    )
except (watch.Lost, ValueError) as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(getattr(error, "exit_code", 2))
print("here", *w.hosts, flush=True)
exec(script)
"""


class Processes:
    """`scripts[n]` is what process n does after the roll call."""

    def __init__(self, scripts: dict[int, str], *, count=None, seconds=15.0, silence=10.0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        program = PROGRAM.replace("PATIENCE", str(seconds)).replace("SILENCE", str(silence))
        count = count or len(scripts)
        self.processes = {
            n: subprocess.Popen(
                [sys.executable, "-c", program, address, str(n % 10), str(count), script],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for n, script in scripts.items()
        }  # fmt: skip

    def read(self, process: int) -> str:
        return self.processes[process].stdout.readline()

    def wait(self) -> dict[int, tuple[int, str]]:
        try:
            said = {n: p.communicate(timeout=60)[0] for n, p in self.processes.items()}
        finally:
            for p in self.processes.values():
                p.kill()
        return {n: (p.returncode, said[n]) for n, p in self.processes.items()}


@pytest.mark.races
def test_all_come_exchange_and_part():
    script = "print(json.dumps([w.gather([process, n]) for n in range(50)])); w.close()"
    ended = Processes(dict.fromkeys(range(3), script)).wait()
    want = [[[process, n] for process in range(3)] for n in range(50)]
    for code, said in ended.values():
        assert code == 0, said
        host, values = said.splitlines()
        assert host.split()[1:] == [socket.gethostname()] * 3
        assert json.loads(values) == want


@pytest.mark.parametrize("missing", [[2], [1, 3]])
def test_who_has_not_come_is_named_everywhere(missing):
    scripts = {n: "" for n in range(4) if n not in missing}
    ended = Processes(scripts, count=4, seconds=1).wait()
    for code, said in ended.values():
        assert code == 75
        assert said.startswith("Lost process")
        assert f"{', '.join(map(str, missing))} of 4 did not come within 1 s" in said
        assert f"0 on {socket.gethostname()}" in said


def test_process_0_has_not_come():
    ((code, said),) = Processes({1: ""}, count=2, seconds=1).wait().values()
    assert code == 75 and "Lost process 0 of 2 did not answer process 1 at 127.0.0.1:" in said


def test_two_with_one_number():
    # The second one is number 1, too. Whichever of them is heard second is refused.
    ended = Processes({0: "", 1: "time.sleep(60)", 11: "time.sleep(60)"}).wait()
    assert {n: code for n, (code, _) in ended.items()} == {0: 2, 1: 2, 11: 2}, ended
    assert all("both say that they are process 1" in said for _, said in ended.values())


def test_another_number_of_processes_is_refused():
    ended = Processes({0: "", 5: ""}, count=3).wait()
    assert all(code == 2 and "is process 5 of 3" in said for code, said in ended.values())


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.races
def test_a_killed_process_ends_the_others_at_once(killed):
    group = Processes(dict.fromkeys(range(3), "time.sleep(60)"))
    for n in group.processes:
        assert group.read(n).startswith("here")
    group.processes[killed].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    ended = group.wait()
    assert time.monotonic() - begin < 8
    for n, (code, said) in ended.items():
        if n != killed:
            assert code == 75
            assert f"process {n}: process {killed} on {socket.gethostname()} is lost" in said


@pytest.mark.races
def test_a_silent_process_counts_as_lost():
    group = Processes(dict.fromkeys(range(3), "time.sleep(60)"), silence=2)
    for n in group.processes:
        assert group.read(n).startswith("here")
    group.processes[2].send_signal(signal.SIGSTOP)
    for n in (0, 1):
        said = group.processes[n].communicate(timeout=20)[0]
        assert group.processes[n].returncode == 75
        assert "process 2 on" in said and "nothing was heard of it for 2 s" in said
    group.processes[2].kill()
    group.wait()


@pytest.mark.races
def test_who_keeps_the_others_waiting_is_named():
    slow = "w.stage('reading data', 30); time.sleep(60)"
    quick = "w.stage('reading data', 30); w.stage('the first step', 5); time.sleep(60)"
    ended = Processes({0: quick, 1: slow, 2: quick}).wait()
    host = socket.gethostname()
    for code, said in ended.values():
        assert code == 75
        assert "the first step took longer than 5 s" in said
        assert f"process 1 on {host} is still at: reading data" in said


@pytest.mark.races
def test_an_error_of_one_ends_all_with_its_reason():
    failing = "w.fail(2, 'the data is broken'); sys.exit(2)"
    ended = Processes({0: "time.sleep(60)", 1: failing, 2: "time.sleep(60)"}).wait()
    for n in (0, 2):
        assert ended[n][0] == 2
        assert "process 1 on" in ended[n][1] and "the data is broken" in ended[n][1]
    assert ended[1][0] == 2


def test_an_error_that_all_have_is_left_to_each():
    script = "w.fail(3, 'diverged'); print('mine'); time.sleep(0.2); sys.exit(3)"
    for code, said in Processes(dict.fromkeys(range(3), script)).wait().values():
        assert code == 3 and said.endswith("mine\n")


def test_an_address_without_a_port():
    with pytest.raises(ValueError, match=r"cluster.coordinator='here' must be HOST:PORT"):
        watch.call_roll("here", process_id=0, num_processes=2, seconds=1, silence=1)
