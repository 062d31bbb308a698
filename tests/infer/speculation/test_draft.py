"""A draft model guesses: no answer changes, and a model that is its own draft is always right."""

import dataclasses
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from infer.engine import capacity
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from infer.engine.request_state import RequestState
from infer.speculation import draft as draft_lib
from infer.text import loading
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.text import tokenizer_training
from tests.infer.engine.test_engine import (
    CFG,
    EOS,
    PARAMS,
    SETTINGS,
    EvenThenEnd,
    answers,
    any_request,
    check_nothing_is_held,
    make_engine,
    serve_at_random,
)


def prepared(cfg: ModelConfig, params: dict) -> draft_lib.Draft:
    params = weights.prepare(cfg, jax.tree.map(jnp.copy, params), dtype=jnp.float32)
    return draft_lib.Draft(cfg, params)


def other(**changes) -> draft_lib.Draft:
    """A smaller model of other weights."""
    cfg = dataclasses.replace(CFG, num_hidden_layers=1, hidden_size=32, name="other", **changes)
    return prepared(cfg, jax.tree.map(lambda x: 4 * x, transformer.init(cfg, jax.random.key(1))))


def drafted(
    draft: draft_lib.Draft | None = None, *, target: draft_lib.Draft | None = None, **changes
) -> engine_lib.Engine:
    """An engine with this draft, or with its own model as one."""
    own = target or prepared(CFG, PARAMS)
    settings = {"speculation": "draft", "guesses": 3, **changes}
    return engine_lib.Engine(
        own.cfg,
        own.params,
        settings=dataclasses.replace(SETTINGS, **settings),
        eos_ids=(EOS,),
        dtype=jnp.float32,
        draft=draft or own,
    )


@pytest.fixture(scope="module")
def plain() -> engine_lib.Engine:
    return make_engine()


@pytest.fixture(scope="module")
def its_own() -> engine_lib.Engine:
    engine = drafted()
    engine.warm_up()
    return engine


def check_same(plain: engine_lib.Engine, request: Request, tokens, logprobs) -> None:
    """As without guesses; products of several positions are not rounded as those of one are."""
    alone, scores, _ = answers(plain, [request])[request.id]
    assert list(tokens) == alone, request.id
    assert [x.token for x in logprobs] == [x.token for x in scores]
    for name in ("drawn", "raw"):
        ours, theirs = ([getattr(x, name) for x in some] for some in (logprobs, scores))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def counted(engine: engine_lib.Engine, before: dict[str, float]) -> tuple[float, float]:
    """Guesses made since, and those that came true."""
    after = engine.stats()
    return tuple(after[name] - before[name] for name in ("guessed_tokens", "accepted_tokens"))


def test_the_model_as_its_own_draft_is_always_right(plain, its_own):
    """Whatever is asked for, with arrivals, cancellations and shared beginnings."""
    before = its_own.stats()
    requests, got = serve_at_random(its_own, 24, seed=20)
    guessed, accepted = counted(its_own, before)
    assert guessed == accepted > 100
    after = its_own.stats()
    assert after["cached_tokens"] > 0, "no prompt began like another"
    assert after["compilations"] == before["compilations"], "the warm-up left out a program"
    check_nothing_is_held(its_own)
    for id, request in requests.items():
        check_same(plain, request, *got[id])


def check_pages(engine: engine_lib.Engine, rows: Sequence[RequestState]) -> None:
    """The draft, which is the model, has written what the model has, but what it reads anew."""
    arrays = engine._device._arrays
    slots, pages = arrays["state"].slots, arrays["state"].pages
    for state in rows:
        length = int(slots.lengths_B[state.slot]) - 1
        table_1M = slots.table_BM[state.slot][None]
        for ours, theirs in zip(arrays["draft_pages"].layers, pages.layers, strict=True):
            mine, its = (kv_pages.gather(x, table_1M)[0] for x in (ours, theirs))
            np.testing.assert_allclose(mine[0, :length], its[0, :length], atol=1e-4)


def test_a_draft_catches_up_with_what_was_drawn_without_it(plain):
    """Guesses begin when two are left of four: then it has read all that the model has."""
    engine = drafted(speculation_rows=2)
    rng = random.Random(21)
    requests = [any_request(rng, str(i)) for i in range(12)]
    for request in requests:
        engine.submit(request)
    got: dict[str, tuple[list, list]] = {request.id: ([], []) for request in requests}
    checked = plain_steps = 0
    while not engine.idle:
        for event in engine.step():
            got[event.id][0].extend(event.tokens)
            got[event.id][1].extend(event.logprobs or ())
        last = engine._in_flight[-1] if engine._in_flight else None
        if last is not None and last.draft_RT is not None:
            check_pages(engine, last.rows)
            checked += 1
        plain_steps += last is not None and last.draft_RT is None and not last.chunks
    assert checked > 4 and plain_steps > 4
    for request in requests:
        check_same(plain, request, *got[request.id])
    stats = engine.stats()
    assert 0 < stats["guessed_tokens"] == stats["accepted_tokens"]
    check_nothing_is_held(engine)


@pytest.mark.parametrize(
    ("rows", "buckets"), [(300, "one"), pytest.param(360, "few", marks=pytest.mark.slow)]
)
def test_a_draft_of_other_weights_and_rows_changes_no_answer(plain, its_own, rows, buckets):
    """Vocabularies of fewer rows and of more: what only one has is never a guess.

    With one bucket not a bit of a logprob depends on what was guessed.
    """
    engine = drafted(other(vocab_size=rows), buckets=buckets)
    rng = random.Random(22)
    requests = [any_request(rng, str(i)) for i in range(10)]
    biased = SamplingParams(temperature=0.5, max_tokens=20, logit_bias=((330, 40.0), (2, 38.0)))
    requests.append(Request(id="biased", tokens=(330, 1, 330), sampling=biased))
    got = answers(engine, requests)
    for request in requests:
        check_same(plain, request, *got[request.id][:2])
    if buckets == "one":
        assert got == answers(its_own, requests)
    stats = engine.stats()
    assert 0 < stats["accepted_tokens"] < stats["guessed_tokens"] / 2
    check_nothing_is_held(engine)


def test_every_length_up_to_the_end(plain, its_own):
    """Answers that end by max_tokens or a stop token at each place of a round."""
    prompt = (5, 6, 9, 200, 31)
    free = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    tokens, _, _ = answers(plain, [Request(id="free", tokens=prompt, sampling=free)])["free"]
    for count in range(1, 12):
        short = dataclasses.replace(free, max_tokens=count)
        stop = dataclasses.replace(free, stop_token_ids=(tokens[count],))
        before = its_own.stats()
        got = answers(
            its_own,
            [
                Request(id="short", tokens=prompt, sampling=short),
                Request(id="stop", tokens=prompt, sampling=stop),
            ],
        )
        assert got["short"][0] == tokens[:count] and got["short"][2] == "length"
        first = tokens.index(tokens[count])
        assert got["stop"][0] == tokens[: first + 1] and got["stop"][2] == "stop"
        guessed, accepted = counted(its_own, before)
        assert guessed == accepted
    check_nothing_is_held(its_own)


def test_a_grammar_beside_guesses(plain, its_own):
    rng = random.Random(23)
    free = [any_request(rng, f"free-{i}") for i in range(5)]
    settings = SamplingParams(temperature=1.3, max_tokens=30, seed=3)
    bound = [
        Request(id=f"b{n}", tokens=(1, 2, 3), sampling=settings, constraint=EvenThenEnd(n))
        for n in (0, 4, 9)
    ]
    before = its_own.stats()
    got = answers(its_own, [*bound, *free])
    for n in (0, 4, 9):
        tokens, _, reason = got[f"b{n}"]
        assert len(tokens) == n + 1 and tokens[-1] == EOS and reason == "stop"
    for request in free:
        check_same(plain, request, *got[request.id][:2])
    guessed, accepted = counted(its_own, before)
    assert guessed == accepted > 0
    check_nothing_is_held(its_own)


@pytest.mark.slow
def test_int8_pages():
    rng = random.Random(24)
    requests = [any_request(rng, str(i)) for i in range(5)]
    engine = drafted(kv_cache="int8")
    got = answers(engine, requests)
    quantised = make_engine(kv_cache="int8")
    for request in requests:
        check_same(quantised, request, *got[request.id][:2])
    stats = engine.stats()
    assert stats["guessed_tokens"] == stats["accepted_tokens"] > 0


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up():
    compiled = []
    event = "/jax/core/compile/backend_compile_duration"
    listener = lambda name, seconds, **_: name == event and compiled.append(seconds)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    small = {"num_slots": 2, "prefill_chunk": 16, "prefill_tokens": 16, "num_pages": 20}
    engine = drafted(target=other(), speculation_rows=1, **small)
    lines = []
    engine.warm_up(show=lines.append)
    assert any("draft tokens of" in line for line in lines) and compiled
    before, count = engine.stats()["compilations"], len(compiled)
    rng = random.Random(25)
    for request in [any_request(rng, str(i)) for i in range(4)]:
        engine.submit(request)
    while not engine.idle:
        engine.step()
    stats = engine.stats()
    assert stats["accepted_tokens"] > 0
    assert (stats["compilations"], len(compiled)) == (before, count)


def test_pages_of_both_models_are_counted(monkeypatch):
    held = prepared(CFG, PARAMS).params
    draft = other()
    monkeypatch.setattr(capacity, "_HOST_BYTES", 40 * 16 * 4096)
    settings = dataclasses.replace(SETTINGS, num_slots=64, num_pages=0)
    counts = []
    one = (CFG, held, None)
    for models in ([one], [one, (draft.cfg, draft.params, None)]):
        counts.append(capacity.num_pages(models, settings=settings, dtype=jnp.dtype("float32")))
    # A token's keys and values: layers x heads x head size, of both.
    sizes = [cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
             for cfg in (CFG, draft.cfg)]  # fmt: skip
    assert counts[1] == pytest.approx(counts[0] * sizes[0] / sum(sizes), abs=1)


def test_drafts_that_cannot_be():
    own = prepared(CFG, PARAMS)

    def make(draft, **changes):
        engine_lib.Engine(
            CFG,
            own.params,
            settings=dataclasses.replace(SETTINGS, **changes),
            eos_ids=(),
            dtype=jnp.float32,
            draft=draft,
        )

    with pytest.raises(ValueError, match="speculation='draft' needs a draft model: give one"):
        make(None, speculation="draft")
    with pytest.raises(ValueError, match="speculation='off' makes no use of it: set"):
        make(own)
    with pytest.raises(ValueError, match="speculation='prompt_lookup' makes no use of it"):
        make(own, speculation="prompt_lookup")
    short = other(max_position_embeddings=100)
    with pytest.raises(ValueError, match="max_length=160 exceeds the 100 tokens of the draft"):
        make(short, speculation="draft")
    stacked = draft_lib.Draft(CFG, PARAMS)
    with pytest.raises(ValueError, match="a draft's layers lie apart"):
        make(stacked, speculation="draft")


def test_what_loading_takes_and_refuses(monkeypatch, loaded):
    """Vocabularies may differ in padding, tokenizers may not."""
    asked = []

    def load(path, **_):
        asked.append(path)
        cfg = dataclasses.replace(loaded.cfg, vocab_size={"wide": 320}.get(path, 288))
        params = prepared(cfg, transformer.init(cfg, jax.random.key(0))).params
        words = loaded.tokenizer
        if path == "foreign":
            words = tokenizer_training.train_bpe(["other words, some of them"], vocab_size=279)
        return dataclasses.replace(loaded, cfg=cfg, params=params, tokenizer=words)

    monkeypatch.setattr(loading, "load_model", load)
    settings = dataclasses.replace(SETTINGS, speculation="draft")
    with pytest.raises(ValueError, match="needs a draft model"):
        loading.load("model", settings=settings, sampling={})
    with pytest.raises(ValueError, match="makes no use of it"):
        loading.load("model", settings=SETTINGS, sampling={}, draft="wide")
    assert not asked, "what cannot be was loaded"
    with pytest.raises(ValueError, match="the draft foreign has another tokenizer than model"):
        loading.load("model", settings=settings, sampling={}, draft="foreign", dtype="float32")
    service = loading.load("model", settings=settings, sampling={}, draft="wide", dtype="float32")
    assert service.engine.settings.speculation == "draft"
    assert asked == ["model", "foreign", "model", "wide"]
