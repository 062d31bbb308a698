"""Watch over the processes of a run: which have arrived, which are lost, which are behind.

JAX's own coordination ends a start that fails, or a run that loses a process, by aborting in C++
after a time-out, without a name. Here every process holds one TCP connection to process 0, on the
port where JAX's coordinator listens afterwards, opened before JAX starts and kept to the end:

    roll call    process 0 hears the number and host name of every process, or says which is missing
    beats        each side says every few seconds that it lives, and which stage it is in; a
                 connection that closes or falls silent is a process that is lost
    stages       each has a limit; where it passes, process 0 names the processes that are behind
    gather       small values of all processes, handed to each
    end          a process that fails says why, and the others end with its reason

Whatever ends the run ends every process, with one line each and one exit code. Lines of JSON; no
jax in this file.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NoReturn

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the run, start it again
_GRACE_SECONDS = 3  # for a process to end by itself with an error that all have
_SEND_SECONDS = 10


class Lost(RuntimeError):
    """A process of the run did not arrive, or was lost. Remedy: start the run again."""

    exit_code = EXIT_RESUMABLE


class Line:
    """One connection that carries JSON values in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.heard = time.monotonic()
        self._pending = b""
        self._lock = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, **values: Any) -> None:
        """Send, or do nothing if the other side has closed; the next read raises the error."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.settimeout(_SEND_SECONDS)
            self.socket.sendall(json.dumps(values).encode() + b"\n")

    def receive(self, seconds: float) -> list[dict]:
        """Values received within a bounded wait. Raises `ConnectionError` if the peer closed."""
        self.socket.settimeout(max(seconds, 0.001))
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError as error:
            raise ConnectionError(str(error)) from None
        if not data:
            raise ConnectionError("closed")
        self.heard = time.monotonic()
        *lines, self._pending = (self._pending + data).split(b"\n")
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            raise ConnectionError("not one of ours") from None
        return [value for value in values if isinstance(value, dict)]

    def gone(self) -> bool:
        """Whether the other side has closed; reads nothing."""
        try:
            self.socket.setblocking(False)
            return self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


class Watch:
    """Connections of one process after the roll call, served by a thread of their own.

    hosts: the host names of all processes.   lines: process 0's to all others, the others' to it.
    silence: seconds without a beat after which a process counts as lost.
    """

    def __init__(
        self, process_id: int, hosts: list[str], lines: dict[int, Line], *, silence: float
    ) -> None:
        self.process_id, self.hosts = process_id, hosts
        self._lines, self._silence = lines, silence
        # For every process: number of stages entered, name of the last stage, and its time limit.
        self._places: dict[int, tuple[int, str, float]] = dict.fromkeys(
            range(len(hosts)), (0, "the start", silence)
        )
        self._since = dict.fromkeys(self._places, time.monotonic())
        self._ended: set[int] = set()
        self._failing: float | None = None  # when this process has begun to end by itself
        self._changed = threading.Condition()
        self._puts: dict[int, dict[int, Any]] = {}
        self._gathered: dict[int, list] = {}
        self._count = 0
        self._last: int | None = None  # the number of the gathering with which all part
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def describe(self, processes: Iterable[int]) -> str:
        """`process 1 on host-b, process 2 on host-c`."""
        return ", ".join(f"process {n} on {self.hosts[n]}" for n in processes)

    def stage(self, name: str, seconds: float) -> None:
        """Enter a stage with a time limit; all processes enter the same stages in one order."""
        number = self._places[self.process_id][0] + 1
        self._since[self.process_id] = time.monotonic()
        self._places[self.process_id] = (number, name, seconds)

    def gather(self, value: Any) -> list:
        """JSON values of all processes, in their order; all processes call it equally often."""
        self._count += 1
        self._put(self.process_id, self._count, value)
        with self._changed:
            self._changed.wait_for(lambda: self._count in self._gathered)
            return self._gathered.pop(self._count)

    def fail(self, code: int, reason: str) -> None:
        """Tell the others that this process ends, and why; it then has a few seconds to end."""
        # An error in a collective may follow from the loss of another process: the thread then
        # reports that loss and ends this process.
        time.sleep(_GRACE_SECONDS)
        self._failing = time.monotonic()
        for line in self._lines.values():
            line.send(fail=[self.process_id, code, reason])

    def close(self) -> None:
        """Wait until all processes are done, then disconnect. For runs without errors only."""
        self._last = self._count + 1
        self.gather(None)
        self._thread.join()
        for line in self._lines.values():
            line.socket.close()

    def _run(self) -> None:
        beat = min(self._silence / 4, 2.0)
        chosen = selectors.DefaultSelector()
        for process, line in self._lines.items():
            chosen.register(line.socket, selectors.EVENT_READ, process)
        due = 0.0
        while not self._closed:
            if time.monotonic() >= due:
                due = time.monotonic() + beat
                for line in self._lines.values():
                    line.send(place=self._places[self.process_id])
                self._check()
            for key, _ in chosen.select(0.2):
                try:
                    for message in self._lines[key.data].receive(0):
                        self._take(key.data, message)
                except ConnectionError as error:
                    if self._closed:
                        return
                    chosen.unregister(key.fileobj)
                    self._lost(key.data, f"its connection ended ({error})")

    def _take(self, sender: int, message: dict) -> None:
        if "place" in message:
            number, name, seconds = message["place"]
            if number != self._places[sender][0]:
                self._since[sender] = time.monotonic()
            self._places[sender] = (number, name, seconds)
        elif "put" in message:
            self._put(sender, *message["put"])
        elif "gathered" in message:
            self._hand_out(*message["gathered"])
        elif "fail" in message:
            process, code, reason = message["fail"]
            self._stop(code, f"{self.describe([process])} has ended: {reason}", _GRACE_SECONDS)
        elif "over" in message:
            self._stop(*message["over"])

    def _put(self, process: int, number: int, value: Any) -> None:
        if self.process_id != 0:
            self._lines[0].send(put=[number, value])
            return
        with self._changed:
            values = self._puts.setdefault(number, {})
            values[process] = value
            if len(values) < len(self.hosts):
                return
            del self._puts[number]
        in_order = [values[n] for n in range(len(self.hosts))]
        self._hand_out(number, in_order)
        for line in self._lines.values():
            line.send(gathered=[number, in_order])

    def _hand_out(self, number: int, values: list) -> None:
        with self._changed:
            self._gathered[number] = values
            self._closed = number == self._last
            self._changed.notify_all()

    def _check(self) -> None:
        now = time.monotonic()
        for process, line in self._lines.items():
            if now - line.heard > self._silence:
                self._lost(process, f"nothing was heard of it for {self._silence:.0f} s")
        if self._failing is not None and now - self._failing > 10 * _GRACE_SECONDS:
            os._exit(1)  # the reason has been reported; the remaining work is of no use
        if self.process_id == 0:
            for process, (_, name, seconds) in self._places.items():
                if now - self._since[process] > seconds:
                    self._stop(EXIT_RESUMABLE, self._describe_stall(name, seconds))

    def _describe_stall(self, name: str, seconds: float) -> str:
        numbers = {n: place[0] for n, place in self._places.items()}
        behind = [n for n in numbers if numbers[n] < max(numbers.values())]
        who = "; ".join(f"{self.describe([n])} is still at: {self._places[n][1]}" for n in behind)
        return (
            f"{name} took longer than {seconds:.0f} s; "
            f"{who or f'all {len(numbers)} processes are in it, none is ahead'}"
        )

    def _lost(self, process: int, how: str) -> None:
        self._stop(
            EXIT_RESUMABLE,
            f"{self.describe([process])} is lost: {how}. This process cannot go on without it; "
            f"start all processes again, and the run goes on from its last checkpoint",
        )

    def _stop(self, code: int, reason: str, grace: float = 0) -> None:
        """End this process, and all others through process 0, unless it is already ending."""
        for line in self._lines.values() if self.process_id == 0 else ():
            line.send(over=[code, reason, grace])
        # Process 0 ends last: JAX's coordinator ends with it, and JAX then aborts the others.
        time.sleep(grace + (self.process_id == 0))
        if self._failing is not None:
            return
        print(f"\nqwen-jax: process {self.process_id}: {reason}", file=sys.stderr, flush=True)
        os._exit(code)


def call_roll(
    address: str, *, process_id: int, num_processes: int, seconds: float, silence: float
) -> Watch:
    """Watch of a complete cluster; process 0 listens at `address`, the others connect to it.

    Raises `Lost`, in every process that arrived, naming those that did not arrive within `seconds`,
    and `ValueError` if two processes have one number or disagree on the number of processes.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"cluster.coordinator={address!r} must be HOST:PORT of process 0")
    if process_id == 0:
        return _listen(int(port), num_processes, seconds=seconds, silence=silence)
    return _report(
        (host.strip("[]"), int(port)),
        process_id,
        num_processes,
        seconds=seconds,
        silence=silence,
    )


def _listen(port: int, num_processes: int, *, seconds: float, silence: float) -> Watch:
    deadline, told = time.monotonic() + seconds, 0.0
    hosts, lines = {0: socket.gethostname()}, {}
    with _server(port, deadline) as server:
        while missing := [n for n in range(num_processes) if n not in hosts]:
            now = time.monotonic()
            if now > deadline:
                _refuse(lines, Lost(_describe_missing(missing, hosts, seconds)))
            if now > told + 1:
                told = now
                for line in lines.values():
                    line.send(waiting=missing)
            server.settimeout(0.2)
            try:
                line = Line(server.accept()[0])
                (hello,) = line.receive(5)
                process, count, name = hello["hello"]
            except (TimeoutError, ConnectionError, ValueError, KeyError):
                continue  # no connection, or a connection that is not from a process of the run
            if count != num_processes or not 0 < process < num_processes:
                text = (
                    f"{name} says that it is process {process} of {count}, process 0 knows of "
                    f"{num_processes}; give every process one cluster.num_processes, and each a "
                    f"cluster.process_id below it"
                )
                _refuse({**lines, -1: line}, ValueError(text))
            if process in lines and not lines[process].gone():
                text = (
                    f"{hosts[process]} and {name} both say that they are process {process}; "
                    f"give each process a cluster.process_id of its own"
                )
                _refuse({**lines, -1: line}, ValueError(text))
            hosts[process], lines[process] = name, line
    names = [hosts[n] for n in range(num_processes)]
    for line in lines.values():
        line.heard = time.monotonic()
        line.send(hosts=names)
    return Watch(0, names, lines, silence=silence)


def _server(port: int, deadline: float) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"process 0 cannot listen at port {port}: {error.strerror}; end what uses it, "
                    f"or give cluster.coordinator another port"
                ) from None
            time.sleep(0.5)  # an earlier run that holds the port may be about to end


def _refuse(lines: dict[int, Line], error: Lost | ValueError) -> NoReturn:
    for line in lines.values():
        line.send(refused=[type(error).__name__, str(error)])
    raise error


def _describe_missing(missing: list[int], hosts: dict[int, str], seconds: float) -> str:
    here = ", ".join(f"{n} on {hosts[n]}" for n in sorted(hosts))
    return (
        f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))} of "
        f"{len(missing) + len(hosts)} did not come within {seconds:.0f} s (here: {here}); see "
        f"their logs, and start all processes again"
    )


def _report(
    address: tuple[str, int],
    process_id: int,
    num_processes: int,
    *,
    seconds: float,
    silence: float,
) -> Watch:
    deadline, trouble = time.monotonic() + seconds, "nothing answers"
    while time.monotonic() < deadline:
        try:
            line = Line(socket.create_connection(address, timeout=5))
            line.send(hello=[process_id, num_processes, socket.gethostname()])
            names = _await_hosts(line, silence)
            return Watch(process_id, names, {0: line}, silence=silence)
        except OSError as error:  # process 0 may not listen yet, or may be restarting
            trouble = str(error)
            time.sleep(0.2)
    raise Lost(
        f"process 0 of {num_processes} did not answer process {process_id} at "
        f"{address[0]}:{address[1]} within {seconds:.0f} s ({trouble}); see its log, and start all "
        f"processes again"
    )


def _await_hosts(line: Line, silence: float) -> list[str]:
    """Host names of all processes, once all have arrived. Process 0 sets the time limit."""
    while True:
        for message in line.receive(silence):
            if "hosts" in message:
                return message["hosts"]
            if "refused" in message:
                kind, text = message["refused"]
                raise (Lost if kind == "Lost" else ValueError)(text)
        if time.monotonic() - line.heard > silence:
            raise ConnectionError("process 0 has fallen silent")
