"""The process: what it says at its start, and how signals end it."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from configs.server import ServerConfig
from infer import server

ROOT = Path(__file__).parents[3]
BODY = {"prompt": "a", "max_tokens": 200, "stream": True}


@contextlib.contextmanager
def _process(**settings) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process, and its address."""
    command = [sys.executable, "-m", "tests.infer.server.fake_server", json.dumps(settings)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny: listening at (http://127\.0\.0\.1:\d+)/v1\n", line)
        assert found, line or process.stderr.read()
        assert process.stdout.readline().startswith("no API key: it answers this machine;")
        while httpx.get(found[1] + "/ready").status_code != 200:
            time.sleep(0.02)
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.races
def test_sigterm_drains_and_ends_with_0():
    with _process() as (process, url):
        with httpx.stream("POST", url + "/v1/completions", json=BODY, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(url + "/ready").status_code == 200:
                assert time.monotonic() < deadline
            assert httpx.post(url + "/v1/completions", json=BODY).status_code == 503
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0


@pytest.mark.races
def test_second_signal_does_not_wait():
    with _process() as (process, url):
        body = {**BODY, "max_tokens": 1000}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            rest = []
            with contextlib.suppress(httpx.RemoteProtocolError):  # a loss, or an error in time
                rest += lines
        assert "data: [DONE]" not in rest
        assert process.wait(20) == 1


def test_taken_port_is_a_users_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}.*another port"):
            server.run(
                None,
                settings=ServerConfig(port=port),
                model_name="tiny",
                num_slots=1,
                warm_up=lambda: None,
            )


@pytest.mark.parametrize(
    ("values", "message"),
    [({"port": 70000}, "port=70000"), ({"max_body": 0}, "max_body=0"), ({"max_queue": -1}, "-1")],
)
def test_settings_check_themselves(values, message):
    with pytest.raises(ValueError, match=message):
        ServerConfig(**values)
