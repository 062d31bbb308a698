"""Keys, sizes, numbers and states: who is let in, and what the others are told."""

import json
import threading

import httpx2 as httpx
import pytest

from configs.server import ServerConfig
from infer.server.http import limits
from tests.infer.server.conftest import Engine, running_server

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
ROUTE = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


def _error(response: httpx.Response) -> dict[str, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe{}", b'{"messages": NaN}', b"[" * 10**5,
        b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", b'{"seed": ' + b"9" * 10**4 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1, "messages": []}',
    ],
)  # fmt: skip
def test_garbage_is_the_clients_mistake(http, body):
    kind = {"content-type": "application/json"}
    response = http.post(ROUTE, content=body, headers=kind)
    assert response.status_code == 400, response.text
    assert _error(response)["type"] == "invalid_request_error"


def test_other_content_types_are_refused(http):
    response = http.post(ROUTE, content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert response.status_code == 415


def test_unknown_paths_and_methods(http):
    assert http.get("/nowhere").status_code == 404
    assert "no" in _error(http.get("/nowhere"))["message"]
    response = http.get(ROUTE)
    assert response.status_code == 405 and "POST" in response.headers["allow"]
    assert http.delete("/v1/models/tiny").status_code == 405


def test_wrong_parameter_is_named(http):
    error = _error(http.post(ROUTE, json={**CHAT, "top_p": 2}))
    assert error["param"] == "top_p" and "top_p=2" in error["message"]


def test_health_readiness_metrics_and_description(http):
    assert http.get("/health").json() == http.get("/ready").json() == {"status": "ready"}
    http.post(ROUTE, json=CHAT)
    http.post(ROUTE, json={})
    text = http.get("/metrics").text
    line = 'qwen_jax_requests_total{endpoint="chat/completions",outcome="answered"}'
    assert line in text and line.replace("answered", "refused") in text
    assert 'qwen_jax_time_to_first_token_seconds_count{endpoint="chat/completions"}' in text
    assert "qwen_jax_open_answers 0.0" in text and "qwen_jax_waiting" in text
    assert "/v1/embeddings" in http.get("/openapi.json").json()["paths"]


def test_api_key(words):
    with (
        running_server(words, api_key="secret") as client,
        httpx.Client(base_url=client.url) as http,
    ):
        for given in (None, "Bearer wrong", "secret", "Basic secret", "Bearer sécret"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            response = http.post(ROUTE, json=CHAT, headers=headers)
            assert response.status_code == 401, given
            assert _error(response)["code"] == "invalid_api_key"
            assert http.get("/v1/models", headers=headers).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert http.post(ROUTE, json=CHAT, headers=right).status_code == 200
        assert http.get("/v1/models", headers=right).status_code == 200
        assert http.get("/health").status_code == 200


def test_api_key_from_file_or_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(limits.API_KEY, raising=False)
    assert limits.read_key(ServerConfig()) is None
    monkeypatch.setenv(limits.API_KEY, "of the environment")
    assert limits.read_key(ServerConfig()) == "of the environment"
    path = tmp_path / "key"
    path.write_text("of the file\n")
    path.chmod(0o600)
    assert limits.read_key(ServerConfig(api_key_file=str(path))) == "of the file"
    path.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        limits.read_key(ServerConfig(api_key_file=str(path)))
    monkeypatch.setenv(limits.API_KEY, " ")
    with pytest.raises(ValueError, match="holds no API key"):
        limits.read_key(ServerConfig())


def test_body_and_prompt_have_a_largest_size(words):
    with (
        running_server(words, max_body=2000, max_prompt_tokens=50) as client,
        httpx.Client(base_url=client.url) as http,
    ):
        text = "a" * 3000
        assert http.post("/v1/completions", json={"prompt": text}).status_code == 413
        chunks = iter([b'{"prompt": "', text.encode(), b'"}'])
        kind = {"content-type": "application/json"}
        assert http.post("/v1/completions", content=chunks, headers=kind).status_code == 413
        response = http.post("/v1/completions", json={"prompt": [1] * 51})
        assert response.status_code == 400
        assert _error(response)["code"] == "context_length_exceeded"
        assert http.post("/v1/completions", json={"prompt": [1] * 50}).status_code == 200
        response = http.post("/v1/embeddings", json={"input": [[1], [2] * 51]})
        assert response.status_code == 400


@pytest.mark.races
def test_places_are_counted_and_given_back(words):
    engine = Engine(words, num_slots=2)
    goes_on = threading.Event()
    engine.trouble = lambda: goes_on.wait(10)
    with (
        running_server(words, engine=engine, max_queue=1) as client,
        httpx.Client(base_url=client.url, timeout=20) as http,
    ):
        assert http.post(ROUTE, json={**CHAT, "n": 4}).status_code == 400  # never fits
        codes: list[int] = []
        ask = lambda: codes.append(http.post(ROUTE, json=CHAT).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        client.wait(lambda: client.running.state.gate.open == 3)
        response = http.post(ROUTE, json=CHAT)
        assert response.status_code == 429 and response.headers["retry-after"]
        assert _error(response)["code"] == "rate_limit_exceeded"
        goes_on.set()
        for thread in threads:
            thread.join()
        assert codes == [200] * 3
        assert http.post(ROUTE, json={**CHAT, "n": 3}).status_code == 200
        client.wait_until_quiet()


@pytest.mark.races
def test_calls_wait_for_the_warm_up_elsewhere(words):
    warm = threading.Event()
    with (
        running_server(words, warm_up=lambda: warm.wait(10)) as client,
        httpx.Client(base_url=client.url) as http,
    ):
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
        response = http.post(ROUTE, json=CHAT)
        assert response.status_code == 503 and response.headers["retry-after"]
        warm.set()
        client.wait(lambda: http.get("/ready").status_code == 200)
        assert http.post(ROUTE, json=CHAT).status_code == 200
