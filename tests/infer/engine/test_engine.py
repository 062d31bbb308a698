"""The engine: every answer is that of the request alone, whatever else it serves."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.engine import EngineConfig
from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from tests.infer import whole_forward

EOS = 7
SETTINGS = EngineConfig(
    num_slots=4,
    page_size=16,
    num_pages=40,
    max_length=160,
    prefill_chunk=32,
    prefill_tokens=64,
    decode_steps=3,
    buckets="one",
)


def _model() -> tuple[ModelConfig, dict]:
    cfg = dataclasses.replace(qwen2_5.tiny(), num_hidden_layers=2, vocab_size=331)
    params = transformer.init(cfg, jax.random.key(0))
    # Wider than at initialisation, so that answers differ from each other and from their prompts.
    return cfg, jax.tree.map(lambda x: 4 * x, params)


CFG, PARAMS = _model()


def make_engine(**changes) -> engine_lib.Engine:
    params = weights.prepare(CFG, jax.tree.map(jnp.copy, PARAMS), dtype=jnp.float32)
    return engine_lib.Engine(
        CFG,
        params,
        settings=dataclasses.replace(SETTINGS, **changes),
        eos_ids=(EOS,),
        dtype=jnp.float32,
    )


@pytest.fixture(scope="module")
def engine() -> engine_lib.Engine:
    return make_engine()


def any_request(rng: random.Random, id: str, *, shared: tuple[int, ...] = ()) -> Request:
    """Of any length and kind; half of them begin alike."""
    prompt = [rng.randrange(CFG.vocab_size) for _ in range(rng.randint(1, 70))]
    if shared and rng.random() < 0.5:
        prompt = [*shared, *prompt[:30]]
    values = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(2**32)}
    kinds = (
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.1, "top_k": 20, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.5, "min_p": 0.02, "ignore_eos": True, "stop_token_ids": (3, 4)},
    )
    values |= rng.choice(kinds)
    if values["max_tokens"] > 5:
        values["min_tokens"] = rng.choice([0, 0, 5])
    return Request(id=id, tokens=tuple(prompt), sampling=SamplingParams(**values))


def answers(engine: engine_lib.Engine, requests: list[Request]) -> dict[str, tuple]:
    """(tokens, logprobs, finish reason) of each."""
    tokens, logprobs, reasons = {}, {}, {}
    for event in engine.run(requests):
        tokens.setdefault(event.id, []).extend(event.tokens)
        logprobs.setdefault(event.id, []).extend(event.logprobs or ())
        if event.finish_reason is not None:
            assert event.id not in reasons, f"{event.id} ended twice"
            reasons[event.id] = event.finish_reason
    return {id: (tokens[id], logprobs[id], reasons[id]) for id in reasons}


def serve_at_random(engine: engine_lib.Engine, count: int, *, seed: int) -> tuple[dict, dict]:
    """Arrivals and cancellations at any time -> requests and answers of those not cancelled."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(CFG.vocab_size) for _ in range(67))
    requests = {f"{seed}-{i}": any_request(rng, f"{seed}-{i}", shared=shared) for i in range(count)}
    coming, got, cancelled, ended = list(requests.values()), {}, set(), set()
    while coming or not engine.idle:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if coming:
                engine.submit(coming.pop())
        served = sorted(set(requests) - ended - cancelled - {r.id for r in coming})
        if served and rng.random() < 0.05:
            unwanted = rng.choice(served)
            cancelled.add(unwanted)
            engine.cancel(unwanted)
        for event in engine.step():
            assert event.id not in ended
            tokens, logprobs = got.setdefault(event.id, ([], []))
            tokens.extend(event.tokens)
            logprobs.extend(event.logprobs or ())
            if event.finish_reason is not None:
                ended.add(event.id)
                assert event.finish_reason != "cancelled" or event.id in cancelled
    assert ended == set(requests), "a request was lost"
    kept = {id: r for id, r in requests.items() if id not in cancelled}
    return kept, {id: got[id] for id in kept}


def check_nothing_is_held(engine: engine_lib.Engine) -> None:
    stats = engine.stats()
    assert stats["free_pages"] + stats["cached_pages"] == engine.settings.num_pages
    assert stats["waiting"] == stats["running"] == 0 and engine.idle


def check_each_alone(engine: engine_lib.Engine, count: int, *, seed: int) -> None:
    requests, together = serve_at_random(engine, count, seed=seed)
    check_nothing_is_held(engine)
    before = engine.stats()["compilations"]
    for id, request in requests.items():
        alone = answers(engine, [request])[id]
        assert together[id] == alone[:2], id  # tokens and logprobs, bit by bit
    assert engine.stats()["compilations"] == before, "a request alone compiled a program"


@pytest.mark.takes(90, "compiles an engine's programs")
def test_each_answer_is_that_of_the_request_alone(engine):
    check_each_alone(engine, 40, seed=0)
    assert engine.stats()["cached_tokens"] > 0, "no prompt began like another"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("policy", "count"), [("fair", 1000), ("longest_first", 200)])
def test_many_requests(policy, count):
    check_each_alone(make_engine(policy=policy), count, seed=1)


def reference(request: Request) -> list[int]:
    """A greedy answer by whole forward passes, penalties and all, in plain numpy."""
    settings, tokens, drawn = request.sampling, list(request.tokens), []
    ends = {*settings.stop_token_ids, *(() if settings.ignore_eos else (EOS,))}
    while len(drawn) < settings.max_tokens and not (drawn and drawn[-1] in ends):
        scores = np.array(whole_forward.logits(CFG, PARAMS, tokens)[-1], np.float64)
        for token, value in settings.logit_bias:
            scores[token] += value
        if len(drawn) < settings.min_tokens:
            scores[list(ends)] = -np.inf
        seen = np.unique(tokens)
        divided = np.where(scores < 0, 1, 0)
        penalty = settings.repetition_penalty
        scores[seen] = np.where(divided, scores * penalty, scores / penalty)[seen]
        ids, counts = np.unique(np.array(drawn, np.int64), return_counts=True)
        scores[ids] -= settings.presence_penalty + settings.frequency_penalty * counts
        drawn.append(int(scores.argmax()))
        tokens.append(drawn[-1])
    return drawn


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"logit_bias": ((11, 100.0), (12, -100.0)), "frequency_penalty": 2.0},
        {"min_tokens": 20, "logit_bias": ((EOS, 8.0),)},
        {"ignore_eos": True, "logit_bias": ((EOS, 8.0),)},
        {"stop_token_ids": (11,), "logit_bias": ((11, 6.0),), "min_tokens": 3},
    ],
    ids=lambda values: "+".join(values) or "plain",
)
def test_what_settings_mean(engine, values):
    prompt = tuple(np.random.default_rng(3).integers(0, CFG.vocab_size, 45).tolist())
    settings = SamplingParams(temperature=0.0, max_tokens=24, **values)
    request = Request(id="one", tokens=prompt, sampling=settings)
    assert answers(engine, [request])["one"][0] == reference(request)


@pytest.mark.takes(20, "compiles an engine's programs")
def test_logprobs_of_prompt_and_answer(engine):
    prompt = tuple(np.random.default_rng(4).integers(0, CFG.vocab_size, 50).tolist())
    settings = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    events = list(engine.run([Request(id="one", tokens=prompt, sampling=settings)]))
    drawn = [token for event in events for token in event.tokens]
    given = [x for event in events for x in event.logprobs or ()]
    (scored,) = [event.prompt_logprobs for event in events if event.prompt_logprobs]
    raw = np.asarray(jax.nn.log_softmax(whole_forward.logits(CFG, PARAMS, [*prompt, *drawn])))
    assert [x.token for x in scored] == list(prompt[1:]) and [x.token for x in given] == drawn
    for position, one in enumerate([*scored, *given]):
        assert one.raw == pytest.approx(raw[position, one.token], abs=1e-4)
        best = np.argsort(-raw[position])[: len(one.top)]
        assert [id for id, _ in one.top] == best.tolist()
        np.testing.assert_allclose([x for _, x in one.top], raw[position, best], atol=1e-4)
    assert len(scored[0].top) == 2 and len(given[0].top) == 3


def test_scores_without_an_answer(engine):
    settings = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (event,) = engine.run([Request(id="one", tokens=(5, 6, 9), sampling=settings)])
    assert event.tokens == () and event.finish_reason == "length"
    assert [x.token for x in event.prompt_logprobs] == [6, 9]
    check_nothing_is_held(engine)


class EvenThenEnd:
    """Even tokens, and after `count` of them the end alone."""

    def __init__(self, count: int):
        self.left = count

    def mask(self) -> np.ndarray:
        allowed = np.zeros(352, bool)
        if self.left:
            allowed[: CFG.vocab_size : 2] = True
        else:
            allowed[EOS] = True
        return np.packbits(allowed, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        assert token % 2 == 0, f"{token} was not allowed"
        self.left -= 1


@pytest.mark.takes(20, "compiles an engine's programs")
def test_a_grammar_beside_free_requests(engine):
    rng = random.Random(5)
    free = [any_request(rng, f"free-{i}") for i in range(5)]
    alone = {r.id: answers(engine, [r])[r.id] for r in free}
    settings = SamplingParams(temperature=1.3, max_tokens=30, seed=3)
    bound = [
        Request(id=f"b{n}", tokens=(1, 2, 3), sampling=settings, constraint=EvenThenEnd(n))
        for n in (0, 4, 9)
    ]
    got = answers(engine, [*bound, *free])
    for n in (0, 4, 9):
        tokens, _, reason = got[f"b{n}"]
        assert len(tokens) == n + 1 and tokens[-1] == EOS and reason == "stop"
    assert {id: got[id] for id in alone} == alone


@pytest.mark.takes(60, "compiles an engine's programs")
def test_nothing_compiles_after_the_warm_up():
    engine = make_engine(num_slots=2, prefill_chunk=16, prefill_tokens=16, num_pages=20)
    lines = []
    assert engine.warm_up(show=lines.append) > 0
    before = engine.stats()["compilations"]
    assert len(lines) >= 7
    rng = random.Random(6)
    requests = [any_request(rng, str(i)) for i in range(6)]
    scored = dataclasses.replace(requests[0].sampling, prompt_logprobs=1)
    requests.append(dataclasses.replace(requests[0], id="scored", sampling=scored))
    assert len(answers(engine, requests)) == 7
    assert engine.stats()["compilations"] == before


@pytest.mark.takes(60, "compiles an engine's programs")
def test_guesses_change_no_answer(engine):
    rng = random.Random(8)
    once = [rng.randrange(CFG.vocab_size) for _ in range(9)]
    requests = [any_request(rng, str(i), shared=tuple(once * 4)) for i in range(8)]
    stubborn = SamplingParams(temperature=0.5, max_tokens=30, logit_bias=((11, 60.0), (12, 60.0)))
    requests.append(Request(id="stubborn", tokens=(11, 12, 11, 12), sampling=stubborn))
    guessing = make_engine(speculation="prompt_lookup", guesses=3, speculation_rows=4)
    got = answers(guessing, requests)
    for request in requests:
        ours, logprobs, reason = got[request.id]
        tokens, alone, ended = answers(engine, [request])[request.id]
        assert (ours, reason) == (tokens, ended), request.id
        # Products of several positions are not rounded as those of one are.
        np.testing.assert_allclose(
            [x.drawn for x in logprobs], [x.drawn for x in alone], rtol=0, atol=1e-4
        )
    stats = guessing.stats()
    assert stats["guessed_tokens"] > stats["accepted_tokens"] > 0
    check_nothing_is_held(guessing)


@pytest.mark.takes(60, "compiles an engine's programs")
def test_int8_pages_answer_alike_alone_and_in_company(engine):
    """How near they are to plain ones, tests of attention say."""
    rng = random.Random(9)
    requests = [any_request(rng, str(i)) for i in range(6)]
    quantised = make_engine(kv_cache="int8")
    got = answers(quantised, requests)
    assert all(got[r.id] == answers(quantised, [r])[r.id] for r in requests)
    assert got != answers(engine, requests), "nothing was rounded"


def test_embeddings(engine):
    prompts = [(4, 5, 6), tuple(range(40))]
    got = engine.embed(prompts)
    for vector, tokens in zip(got, prompts, strict=True):
        hidden = transformer.apply(CFG, PARAMS, jnp.asarray([tokens])).hidden_BTD[0, -1]
        np.testing.assert_allclose(vector, hidden / np.linalg.norm(hidden), atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "message"),
    [
        ((400,), 4, "prompt token 400 is outside the vocabulary of 331"),
        ((1,) * 150, 20, "150 tokens with max_tokens=20 needs 170 positions; this engine has 160"),
    ],
)
def test_what_cannot_be_served_is_refused(engine, tokens, max_tokens, message):
    settings = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(id="one", tokens=tokens, sampling=settings))
    assert engine.idle


def test_one_id_is_one_request(engine):
    request = Request(id="one", tokens=(1, 2), sampling=SamplingParams(max_tokens=2))
    engine.submit(request)
    with pytest.raises(ValueError, match="'one' is being served"):
        engine.submit(request)
    engine.cancel("unknown")
    engine.cancel("one")
    (event,) = [event for _ in range(3) for event in engine.step()]
    assert event.finish_reason == "cancelled"
    check_nothing_is_held(engine)


def test_engines_that_cannot_be():
    stacked = {**PARAMS}
    with pytest.raises(ValueError, match="layers lie apart"):
        engine_lib.Engine(CFG, stacked, settings=SETTINGS, eos_ids=(), dtype=jnp.float32)
    with pytest.raises(ValueError, match="max_length=999999 exceeds the"):
        make_engine(max_length=999999)
