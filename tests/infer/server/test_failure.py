"""An engine that fails or hangs, and a server that is told to stop: everybody hears of it."""

import threading
import time

import httpx2 as httpx
import numpy as np
import pytest

from tests.infer.server.conftest import Client, Engine, running_server

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
ROUTE = "/v1/chat/completions"


class Calls:
    """Calls in threads: what became of each."""

    def __init__(self, client: Client, *bodies: dict) -> None:
        self.results: list[tuple[int, str]] = []
        self._url = client.url + ROUTE
        self._threads = [threading.Thread(target=self._ask, args=(body,)) for body in bodies]
        for thread in self._threads:
            thread.start()

    def _ask(self, body: dict) -> None:
        response = httpx.post(self._url, json=body, timeout=30)
        self.results.append((response.status_code, response.text))

    def wait(self) -> list[tuple[int, str]]:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a call hangs"
        return sorted(self.results)


def _fail() -> None:
    raise RuntimeError("the device is gone")


@pytest.mark.races
def test_failing_engine_fails_all_that_is_open_and_is_not_ready(words, caplog):
    engine = Engine(words, seconds=0.01, num_slots=2)
    with running_server(words, engine=engine) as client:
        long = {**CHAT, "max_tokens": 900}
        calls = Calls(client, long, long, long, {**long, "stream": True})
        client.wait(lambda: client.running.state.gate.open == 4 and engine.num_steps > 3)
        engine.trouble = _fail
        results = calls.wait()
        codes = [code for code, _ in results]
        assert codes in ([500] * 4, [200, 500, 500, 500])  # the stream may have begun
        assert all("the engine failed" in text for _, text in results)
        assert "[DONE]" not in results[0][1]
        assert httpx.get(client.url + "/ready").status_code == 503
        assert httpx.get(client.url + "/health").status_code == 503
        assert httpx.post(client.url + ROUTE, json=CHAT).status_code == 500
        client.wait(lambda: client.running.state.gate.open == 0)
    assert "the device is gone" in caplog.text


def test_failing_warm_up_is_not_ready(words):
    with running_server(words, warm_up=_fail) as client:
        client.wait(lambda: client.running.state.engine.state == "failed")
        assert httpx.get(client.url + "/health").status_code == 503
        assert httpx.post(client.url + ROUTE, json=CHAT).status_code == 500


@pytest.mark.races
def test_hanging_engine_is_given_up(words):
    engine = Engine(words)
    goes_on = threading.Event()
    engine.trouble = lambda: goes_on.wait(30)
    with running_server(words, engine=engine, engine_seconds=0.3) as client:
        results = Calls(client, CHAT, {**CHAT, "stream": True}).wait()
        assert [code for code, _ in results] == [500, 500]
        assert all("hangs" in text for _, text in results)
        assert httpx.get(client.url + "/health").status_code == 503
        goes_on.set()


@pytest.mark.races
def test_engine_that_hangs_at_a_submission_is_given_up_too(words):
    engine = Engine(words)
    goes_on = threading.Event()
    submit = engine.submit
    engine.submit = lambda request: (goes_on.wait(30), submit(request))
    with running_server(words, engine=engine, engine_seconds=0.3) as client:
        ((code, text),) = Calls(client, CHAT).wait()
        assert code == 500 and "hangs" in text
        goes_on.set()


@pytest.mark.races
def test_a_request_that_breaks_the_service_harms_no_other(words, monkeypatch):
    with running_server(words) as client:
        engine, submit = client.engine, client.engine.submit

        def fragile(request):
            if len(request.tokens) == 7:
                raise KeyError("a mistake of ours")
            submit(request)

        monkeypatch.setattr(engine, "submit", fragile)
        url = client.url + "/v1/completions"
        assert httpx.post(url, json={"prompt": [1] * 7}).status_code == 500
        assert httpx.post(url, json={"prompt": [1] * 6}).status_code == 200
        assert httpx.get(client.url + "/ready").status_code == 200
        client.wait_until_quiet()


class DeadEnd:
    """A grammar that allows something, and then nothing."""

    def __init__(self, spec) -> None:
        if spec.value == "impossible":
            raise ValueError("regex: no answer can begin")

    def mask(self) -> np.ndarray:
        return np.full(9, 2**32 - 1, np.uint32)

    def accept(self, token: int) -> None:
        raise RuntimeError("the grammar has come to a dead end")


def test_grammar_that_fails_fails_its_own_call_alone(words):
    engine = Engine(words, seconds=0.01)
    step = engine.step

    def obeying():
        events = step()
        for event in events:
            request = requests.get(event.id)
            for token in event.tokens if request and request.constraint else ():
                request.constraint.accept(token)
        return events

    requests = {}
    submit = engine.submit
    engine.submit = lambda request: (requests.update({request.id: request}), submit(request))
    engine.step = obeying
    with running_server(words, engine=engine, compile_constraint=DeadEnd) as client:
        long = {**CHAT, "max_tokens": 100}
        calls = Calls(client, long, {**long, "guided_regex": "a+"})
        (good, _), (bad, text) = calls.wait()
        assert (good, bad) == (200, 400) and "dead end" in text
        response = httpx.post(client.url + ROUTE, json={**long, "guided_regex": "impossible"})
        assert response.status_code == 400 and "no answer can begin" in response.text
        assert httpx.get(client.url + "/ready").status_code == 200
        client.wait_until_quiet()


@pytest.mark.races
def test_draining_finishes_what_is_open_and_refuses_what_is_new(words):
    engine = Engine(words, seconds=0.02)
    with running_server(words, engine=engine) as client:
        calls = Calls(client, {**CHAT, "max_tokens": 200}, {**CHAT, "max_tokens": 200})
        client.wait(lambda: len(engine.running) == 2)
        with httpx.Client(base_url=client.url) as http:
            assert http.get("/ready").status_code == 200
            client.stop()
            client.wait(lambda: client.running.state.gate.draining)
            assert http.get("/ready").status_code == 503
            assert http.get("/health").status_code == 200
            assert http.post(ROUTE, json=CHAT).status_code == 503
        assert [code for code, _ in calls.wait()] == [200, 200]
        assert all('"completion_tokens":200' in text for _, text in calls.results)
    assert client.code == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.races
def test_draining_has_a_limit(words, stream):
    engine = Engine(words, seconds=0.05)
    with running_server(words, engine=engine, drain_seconds=0.2) as client:
        calls = Calls(client, {**CHAT, "max_tokens": 900, "stream": stream})
        client.wait(lambda: len(engine.running) == 1 and engine.num_steps > 3)
        start = time.monotonic()
        client.stop()
        ((code, text),) = calls.wait()
        assert time.monotonic() - start < 5
        assert code == (200 if stream else 500) and "the server has stopped" in text
    assert client.code == 1
