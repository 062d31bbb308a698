"""Thousands of malformed requests: no 5xx, nothing is left behind, nothing hangs."""

import collections
import json
import random
import threading
from pathlib import Path

import httpx2 as httpx
import pytest

from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec
from infer.engine.request import Constraint
from tests.infer.server import fuzzer
from tests.infer.server.conftest import Engine, running_server

NUM_CLIENTS = 4
CODES = {200, 400, 404, 408, 413, 415, 429}


def _check(path: str, body: bytes, response: httpx.Response) -> None:
    said = f"{path} {body!r}: {response.status_code} {response.text[:500]}"
    assert response.status_code in CODES, said
    if response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n"), said
        events = response.text.split("\n\n")[:-2]
        assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events), said
    else:
        value = response.json()
        if response.status_code == 200:
            assert "choices" in value or "data" in value, said
        else:
            assert set(value["error"]) == {"message", "type", "param", "code"}, said


def _fuzz(words, *, num_calls: int) -> collections.Counter:
    """Statuses that came."""
    engine = Engine(words, num_slots=8, max_length=300)
    codes: collections.Counter = collections.Counter()
    problems: list[BaseException] = []

    def ask(number: int) -> None:
        rng = random.Random(number)
        kind = {"content-type": "application/json"}
        try:
            with httpx.Client(base_url=client.url, timeout=30) as http:
                for _ in range(num_calls // NUM_CLIENTS):
                    path, body = fuzzer.call(rng, model="tiny")
                    response = http.post(path, content=body, headers=kind)
                    _check(path, body, response)
                    codes[response.status_code] += 1
        except BaseException as problem:
            problems.append(problem)

    def compile_constraint(spec: ConstraintSpec) -> Constraint:
        ids = words.eos_ids
        return constraints.compile(
            spec, tokenizer=words, vocab_size=words.vocab_size, eos_ids=ids
        ).start()

    with running_server(
        words, engine=engine, compile_constraint=compile_constraint, max_queue=1000
    ) as client:
        client.wait(lambda: client.running.state.engine.state == "ready")
        before = threading.active_count(), _num_files()
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]
        client.wait_until_quiet()
        client.wait(lambda: not client.num_waiting_tasks)
        client.wait(lambda: not client.running.server.server_state.connections)
        threads_now, files_now = threading.active_count(), _num_files()
        assert threads_now <= before[0] + 4  # the encoders, which stay
        assert files_now <= before[1]
        assert not client.running.state.engine.num_open
        assert httpx.get(client.url + "/ready").status_code == 200
    return codes


def _num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.races
def test_malformed_requests(words):
    codes = _fuzz(words, num_calls=300)
    assert codes.total() == 300
    assert codes[200] > 25 and codes[400] > 100


@pytest.mark.slow
def test_ten_thousand_malformed_requests(words):
    codes = _fuzz(words, num_calls=10_000)
    assert codes.total() == 10_000
    print(dict(codes))
