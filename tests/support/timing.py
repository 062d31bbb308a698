"""What each test costs: the longest files first, a budget for each test, tests run many times.

A pytest plugin, which `tests/conftest.py` registers. Costs are CPU seconds of the process and of
the children that it waited for, since wall time says more about the machine's other work.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "durations.json"
SHARDS = "tests/test_multidevice.py"  # each of its tests is a process; they need no common worker
SETUP = pytest.StashKey[float]()
SHARED = pytest.StashKey[list]()


def cpu_seconds() -> float:
    """CPU seconds used so far by this process and by the children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def unit(nodeid: str) -> str:
    """The tests that run one after the other in one worker: a file, or one shard."""
    file = nodeid.split("::", 1)[0]
    return nodeid if file == SHARDS else file


def _kind(keywords) -> str:
    return "slow" if "slow" in keywords else "default"


def pytest_addoption(parser):
    group = parser.getgroup("times")
    group.addoption(
        "--record-durations", action="store_true", help="write the seconds of each file that ran"
    )
    group.addoption(
        "--max-seconds", type=float, help="fail a test of more CPU seconds that is not marked"
    )
    group.addoption("--repeat", type=int, default=1, metavar="N", help="run each test N times")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; .ci/run runs it, the default run does not")
    config.addinivalue_line("markers", "races: kills or races; `make test-races` runs it 50 times")
    config.addinivalue_line(
        "markers", "takes(seconds, reason): may use more CPU seconds than --max-seconds, and why"
    )
    config.stash[SHARED] = []
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(config), "record-durations")


def pytest_generate_tests(metafunc):
    count = metafunc.config.option.repeat
    if count > 1:
        metafunc.fixturenames.append("_repetition")
        metafunc.parametrize("_repetition", range(count), ids=[f"run{n}" for n in range(count)])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    keys = {(unit(item.nodeid), _kind(item.keywords)) for item in items}
    seconds = Counter()
    for name, kind in keys:
        seconds[name] += recorded.get(kind, {}).get(name, 0)
    items.sort(key=lambda item: -seconds[unit(item.nodeid)])


def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LongestFirst(LoadFileScheduling):
        """Units of work in the order of collection."""

        def _split_scope(self, nodeid):
            return unit(nodeid)

    config.option.loadscopereorder = False
    return LongestFirst(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Keeps session fixtures out of a test's own seconds: any of the tests may be the first."""
    if fixturedef.scope != "session":
        return (yield)
    spent = request.config.stash[SHARED]
    before, inner = cpu_seconds(), len(spent)
    try:
        return (yield)
    finally:
        del spent[inner:]
        spent.append(cpu_seconds() - before)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.config.stash[SHARED].clear()
    before = cpu_seconds()
    try:
        return (yield)
    finally:
        item.stash[SETUP] = before + sum(item.config.stash[SHARED])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when != "call":
        return report
    report.cpu_seconds = cpu_seconds() - item.stash[SETUP]
    if item.config.option.max_seconds is None or item.get_closest_marker("slow"):
        return report
    marked = item.get_closest_marker("takes")
    limit = item.config.option.max_seconds
    if marked:
        limit = max(limit, _takes(*marked.args, **marked.kwargs))
    if report.passed and report.cpu_seconds > limit:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {report.cpu_seconds:.1f} s of CPU, more than {limit:g}: make it "
            "faster, mark it slow, or mark it takes(seconds=..., reason=...)"
        )
    return report


def _takes(seconds: float, reason: str) -> float:
    """CPU seconds that the marker allows."""
    assert reason, "say why the test needs more"
    return seconds


class Record:
    """Adds up what the workers report, in the process that started them."""

    def __init__(self, config):
        self.config, self.cpu, self.runs = config, {}, {}
        self.seconds = {"default": Counter(), "slow": Counter()}

    def pytest_runtest_logreport(self, report):
        if hasattr(report, "cpu_seconds"):
            self.cpu[report.nodeid] = report.cpu_seconds
            self.seconds[_kind(report.keywords)][unit(report.nodeid)] += report.cpu_seconds
        test = report.nodeid.rpartition("[")[0] or report.nodeid
        if report.when == "call" or not report.passed:
            self.runs.setdefault(test, []).append(report.outcome)

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        if self.config.option.repeat > 1:
            write("passed  of  test")
            for test, outcomes in sorted(self.runs.items()):
                write(f"{outcomes.count('passed'):6} {len(outcomes):3}  {test}")
        if self.config.option.durations:
            terminalreporter.write_sep("=", "most CPU seconds, setup and call")
            for test in sorted(self.cpu, key=self.cpu.get, reverse=True)[:20]:
                write(f"{self.cpu[test]:6.1f}  {test}")
        if self.config.option.record_durations:
            recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
            for kind, seconds in self.seconds.items():
                known = recorded.get(kind, {}) | {n: round(s, 1) for n, s in seconds.items()}
                recorded[kind] = {name: known[name] for name in sorted(known) if _exists(name)}
            FILE.write_text(json.dumps(recorded, indent=1) + "\n")


def _exists(name: str) -> bool:
    return (FILE.parents[1] / name.split("::", 1)[0]).exists()
