"""Clients that leave, stall, dawdle and send garbage: they lose their answer, and nobody else does.

Everything is by plain sockets: a well-behaved client could not be so rude.
"""

import concurrent.futures
import json
import random
import socket
import threading
import time

import httpx2 as httpx
import pytest

from tests.infer.server.conftest import Client, Engine, running_server

LONG = {"prompt": [1, 2, 3], "max_tokens": 900, "stream": True}


def _post(body: dict, *, path: str = "/v1/completions", close: bool = False) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "Connection: close\r\n" if close else ""
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _rest(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def _outcomes(client: Client) -> dict[str, int]:
    """Calls by outcome, all endpoints together."""
    found: dict[str, int] = {}
    for line in httpx.get(client.url + "/metrics").text.splitlines():
        if line.startswith("qwen_jax_requests_total{"):
            outcome = line.split('outcome="')[1].split('"')[0]
            found[outcome] = found.get(outcome, 0) + int(float(line.split()[-1]))
    return found


@pytest.fixture(scope="module")
def slow(words):
    """A server whose answers of 900 tokens take seconds, and whose patience is short."""
    engine = Engine(words, seconds=0.01, num_slots=2)
    with running_server(
        words, engine=engine, header_seconds=0.3, body_seconds=0.3, stall_seconds=0.3,
        idle_seconds=0.3, send_buffer=4096,
    ) as client:  # fmt: skip
        yield client
        client.wait_until_quiet()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.races
def test_leaving_cancels_a_running_answer(slow, stream):
    before = _outcomes(slow).get("client_left", 0)
    connection = slow.connect()
    connection.sendall(_post({**LONG, "stream": stream}))
    slow.wait(lambda: slow.engine.running)
    if stream:
        assert b"200 OK" in connection.recv(4096)
    connection.close()
    slow.wait_until_quiet(seconds=2)
    slow.wait(lambda: _outcomes(slow)["client_left"] == before + 1)


@pytest.mark.races
def test_leaving_cancels_a_waiting_answer(slow):
    first = [slow.connect() for _ in range(2)]
    for connection in first:
        connection.sendall(_post(LONG))
    slow.wait(lambda: len(slow.engine.running) == 2)
    with slow.connect() as third:
        third.sendall(_post(LONG))
        slow.wait(lambda: slow.engine.waiting)
    slow.wait(lambda: not slow.engine.waiting, seconds=2)
    assert len(slow.engine.running) == 2
    for connection in first:
        connection.close()


@pytest.mark.races
def test_client_that_does_not_read_is_given_up(words, caplog):
    """Its buffers fill, and its request does not go on for long."""
    engine = Engine(words, num_slots=2, max_length=200_000)
    with (
        running_server(
            words, engine=engine, stall_seconds=0.3, send_buffer=4096, stream_buffer=10**6
        ) as client,
        client.connect() as connection,
    ):
        connection.sendall(_post({**LONG, "max_tokens": 150_000, "logprobs": 5}))
        client.wait(lambda: engine.running)
        client.wait_until_quiet(seconds=5)
        assert "has taken nothing of its answer for 0.3 s" in caplog.text
        assert _outcomes(client) == {"client_stalled": 1}


@pytest.mark.races
def test_what_waits_for_a_client_is_bounded(words, caplog):
    engine = Engine(words, num_slots=2, max_length=200_000)
    with running_server(words, engine=engine, stream_buffer=50, send_buffer=4096) as client:
        with client.connect() as connection:
            connection.sendall(_post({**LONG, "max_tokens": 150_000, "logprobs": 5}))
            client.wait(lambda: "50 pieces of the answer wait" in caplog.text)
            client.wait(lambda: engine.idle)
        client.wait_until_quiet()
        assert _outcomes(client) == {"client_stalled": 1}


@pytest.mark.races
def test_slow_reader_that_does_read_gets_everything(slow):
    with slow.connect() as connection:
        connection.sendall(_post({**LONG, "max_tokens": 60}, close=True))
        data = b""
        while part := connection.recv(256):
            data += part
            time.sleep(0.005)
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "begin",
    [b"", b"POST /v1/comple", b"POST / HTTP/1.1\r\nHost: x\r\nX-A: b\r\n"],
    ids=["nothing", "line", "headers"],
)
@pytest.mark.races
def test_headers_have_their_time(slow, begin):
    with slow.connect() as connection:
        connection.sendall(begin)
        start = time.monotonic()
        assert _rest(connection) == b""
        assert time.monotonic() - start < 3


@pytest.mark.races
def test_headers_have_their_time_after_an_answer_too(slow):
    with slow.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /heal")
        start = time.monotonic()
        assert _rest(connection).count(b"200 OK") == 1
        assert time.monotonic() - start < 3


def test_headers_have_a_largest_size(slow):
    with slow.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 2**17)
        assert b" 400 " in _rest(connection)


@pytest.mark.races
def test_body_has_its_time(slow):
    with slow.connect() as connection:
        whole = _post(LONG)
        connection.sendall(whole[:-10])
        start = time.monotonic()
        answer = _rest(connection)
        assert b" 408 " in answer and b"the body was not there after 0.3 s" in answer
        assert time.monotonic() - start < 3


@pytest.mark.races
def test_what_follows_a_refusal_is_not_read_for_ever(slow):
    with slow.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n")
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 5:
                connection.sendall(b"x" * 1000)
                time.sleep(0.05)
        assert time.monotonic() - start < 3


def test_bytes_that_are_not_http(slow):
    """Each gets a refusal and a closed connection, while a well-behaved client loses nothing."""
    rng = random.Random(0)
    tls_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    garbage = [rng.randbytes(rng.randrange(1, 300)) for _ in range(50)]
    body = {"prompt": [1, 2, 3], "max_tokens": 50}

    def answer() -> httpx.Response:
        return httpx.post(slow.url + "/v1/completions", json=body, timeout=30)

    pool = concurrent.futures.ThreadPoolExecutor()
    meanwhile = pool.submit(answer)
    for data in (*garbage, tls_hello, b"GET / FTP/1.1", b"\0" * 100):
        with slow.connect() as connection:
            connection.sendall(data + b"\r\n\r\n")
            head, _, text = _rest(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), (data, head)
        assert b"connection: close" in head.lower() and text == b"Invalid HTTP request received."
    for response in (meanwhile.result(), answer()):
        assert response.status_code == 200
        assert response.json()["usage"]["completion_tokens"] == 50
    pool.shutdown()


def _vanish(client: Client, rng: random.Random) -> None:
    with client.connect() as connection:
        connection.sendall(_post(LONG)[: rng.randrange(10, 400)])
        time.sleep(rng.random() * 0.1)


def _stall(client: Client, rng: random.Random) -> None:
    with client.connect() as connection:
        connection.sendall(_post({**LONG, "logprobs": 5}))
        time.sleep(rng.random() * 0.5)


def _babble(client: Client, rng: random.Random) -> None:
    with client.connect() as connection:
        connection.sendall(rng.randbytes(rng.randrange(1, 3000)) + b"\r\n\r\n")
        _rest(connection)


@pytest.mark.races
def test_good_clients_lose_nothing_among_bad_ones(words):
    engine = Engine(words, seconds=0.002, num_slots=16)
    settings = {"header_seconds": 0.5, "body_seconds": 0.5, "stall_seconds": 0.3}
    results: list[tuple[int, int]] = []
    with running_server(words, engine=engine, send_buffer=4096, **settings) as client:

        def misbehave(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(10):
                rng.choice((_vanish, _stall, _babble))(client, rng)

        def behave() -> None:
            with httpx.Client(base_url=client.url, timeout=30) as http:
                for count in range(1, 11):
                    body = {"prompt": [1, count], "max_tokens": count * 5}
                    response = http.post("/v1/completions", json=body)
                    used = response.json()["usage"]["completion_tokens"]
                    results.append((response.status_code, used - count * 5))

        threads = [threading.Thread(target=misbehave, args=(seed,)) for seed in range(8)]
        threads += [threading.Thread(target=behave) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert results == [(200, 0)] * 60
        client.wait_until_quiet()
        client.wait(lambda: not client.num_waiting_tasks)
        assert httpx.get(client.url + "/ready").status_code == 200
        assert "failed" not in _outcomes(client)
