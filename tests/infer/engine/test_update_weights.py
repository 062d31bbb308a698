"""After an update of its weights an engine answers as one that was made with them, bit for bit."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sampling import SamplingParams
from infer.engine import engine as engine_lib
from infer.engine.request import Request
from infer.speculation import draft as draft_lib
from qwen_jax.decode import weights
from qwen_jax.model import transformer
from tests.infer.engine.test_engine import (
    CFG,
    EOS,
    PARAMS,
    SETTINGS,
    answers,
    any_request,
    check_nothing_is_held,
)

NEW = jax.tree.map(lambda x: 4 * x, transformer.init(CFG, jax.random.key(5)))
DRAFT_CFG = dataclasses.replace(CFG, num_hidden_layers=1, name="draft")
DRAFTS = [
    jax.tree.map(lambda x: 4 * x, transformer.init(DRAFT_CFG, jax.random.key(seed)))
    for seed in (6, 7)
]


def prepared(params: dict, *, cfg=CFG):
    return weights.prepare(cfg, jax.tree.map(jnp.copy, params), dtype=jnp.float32)


def make(params: dict, *, speculation: str = "off", draft: dict = DRAFTS[0]) -> engine_lib.Engine:
    return engine_lib.Engine(
        CFG,
        prepared(params),
        settings=dataclasses.replace(SETTINGS, speculation=speculation, guesses=3),
        eos_ids=(EOS,),
        dtype=jnp.float32,
        draft=(
            draft_lib.Draft(DRAFT_CFG, prepared(draft, cfg=DRAFT_CFG))
            if speculation == "draft"
            else None
        ),
    )


def requests(name: str, count: int, *, seed: int = 0) -> list[Request]:
    """Requests of many kinds whose prompts repeat themselves and begin alike."""
    rng = random.Random(seed)
    once = tuple(rng.randrange(CFG.vocab_size) for _ in range(9))
    made = []
    for index in range(count):
        request = any_request(rng, f"{name}{index}", shared=once * 8)
        sampling = dataclasses.replace(request.sampling, logprobs=2)
        made.append(dataclasses.replace(request, sampling=sampling))
    return made


@pytest.fixture
def backend_compilations():
    """Seconds of each program that XLA compiles in this process."""
    seconds = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.takes(90, "compiles an engine's programs")
@pytest.mark.parametrize("speculation", ["off", "prompt_lookup", "draft"])
def test_an_updated_engine_answers_as_a_fresh_one(speculation, backend_compilations):
    """With prompts of the old weights in the prefix cache, and a draft model that changes too."""
    engine, wanted = make(PARAMS, speculation=speculation), requests("a", 8)

    def serve(engine: engine_lib.Engine) -> dict[str, tuple]:
        if speculation != "prompt_lookup":
            return answers(engine, wanted)
        # Whether a pass verifies or decodes depends on the company, and rounding on that.
        return {request.id: answers(engine, [request])[request.id] for request in wanted}

    before = serve(engine)
    assert engine.stats()["cached_tokens"] > 0, "no prompt began like another"
    new, new_draft = prepared(NEW), None
    if speculation == "draft":
        new_draft = prepared(DRAFTS[1], cfg=DRAFT_CFG)
    count, compiled = engine.stats()["compilations"], len(backend_compilations)
    assert compiled > 0
    engine.update_weights(new, version=3, draft_params=new_draft)
    assert engine.weight_version == 3
    after = serve(engine)
    assert engine.stats()["compilations"] == count
    assert len(backend_compilations) == compiled, "something was compiled"
    check_nothing_is_held(engine)
    fresh = make(NEW, speculation=speculation, draft=DRAFTS[1])
    assert after == serve(fresh)  # tokens, logprobs and reasons, bit by bit
    assert all(after[id][0] != before[id][0] for id in after if len(after[id][0]) > 4)


@pytest.mark.takes(90, "compiles an engine's programs")
@pytest.mark.parametrize("speculation", ["off", "prompt_lookup", "draft"])
def test_requests_that_run_end_on_the_old_weights(speculation):
    """Those that wait, and those that come later, are served by the new ones from their start."""
    engine, wanted = make(PARAMS, speculation=speculation), requests("a", 12, seed=1)
    events, late = [], wanted[9:]
    for request in wanted[:9]:
        engine.submit(request)
    while not any(event.tokens for event in events):
        events += engine.step()
    running = {state.request.id for state in engine._scheduler._running.values()}
    engine.update_weights(prepared(NEW), version=1)
    assert engine.weight_version == 0 and engine.stats()["waiting"] > 0
    for request in late:
        engine.submit(request)
    while not engine.idle:
        events += engine.step()
    assert engine.weight_version == 1
    check_nothing_is_held(engine)
    versions = {id: {e.weight_version for e in events if e.id == id} for id in running}
    assert all(seen == {0} for seen in versions.values())
    alone = [make(params, speculation=speculation) for params in (PARAMS, NEW)]
    num_old = 0
    for request in wanted:
        own = [event for event in events if event.id == request.id]
        (version,) = {event.weight_version for event in own}
        num_old += version == 0
        assert version == (0 if request.id in running else 1) or own[0] is events[0]
        tokens, logprobs, reason = answers(alone[version], [request])[request.id]
        assert [token for event in own for token in event.tokens] == tokens
        assert own[-1].finish_reason == reason
        given = [entry for event in own for entry in event.logprobs]
        if speculation == "prompt_lookup":
            # What a pass verifies depends on the company, and rounding on that.
            ours, theirs = ([entry.raw for entry in some] for some in (given, logprobs))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
        else:
            assert given == logprobs
    assert 4 <= num_old < 9


@pytest.mark.takes(90, "compiles an engine's programs")
def test_cancelling_what_runs_hurries_an_update():
    engine = make(PARAMS)
    settings = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    for id in "ab":
        engine.submit(Request(id=id, tokens=(1, 2, 3), sampling=settings))
    for _ in range(4):
        engine.step()
    engine.update_weights(prepared(NEW), version=1)
    engine.update_weights(prepared(PARAMS), version=2)
    engine.cancel("a")
    assert engine.weight_version == 0
    engine.cancel("b")
    assert engine.weight_version == 2
    while not engine.idle:
        engine.step()
    request = Request(id="c", tokens=(1, 2, 3), sampling=settings)
    assert answers(engine, [request]) == answers(make(PARAMS), [request])
    check_nothing_is_held(engine)


@pytest.mark.takes(90, "compiles an engine's programs")
def test_weights_that_do_not_fit_change_nothing():
    engine, (request,) = make(PARAMS), requests("a", 1, seed=2)
    before = answers(engine, [request])

    def changed(**leaves) -> dict:
        params = jax.tree.map(jnp.copy, NEW)
        params["embed"] = {**params["embed"], **leaves}
        return params

    good = prepared(NEW)
    (name,) = NEW["embed"]
    short = prepared(changed(**{name: NEW["embed"][name][:-1]}))
    with pytest.raises(
        ValueError, match=rf"embed\.{name} has shape \(330, 128\) in the new weights"
    ):
        engine.update_weights(short, version=1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), good)
    with pytest.raises(ValueError, match="has dtype bfloat16 in the new weights and float32 in"):
        engine.update_weights(half, version=1)
    with pytest.raises(ValueError, match="embed.more is given in the new weights and missing in"):
        engine.update_weights(prepared(changed(more=jnp.ones(3))), version=1)
    with pytest.raises(ValueError, match="version=0 is not greater than 0"):
        engine.update_weights(good, version=0)
    with pytest.raises(ValueError, match="this engine has no draft model"):
        engine.update_weights(good, version=1, draft_params=good)
    with pytest.raises(ValueError, match=rf"embed\.{name} has shape \(330, 128\) in the new"):
        engine.update_weights(changed(**{name: NEW["embed"][name][:-1]}), version=1)
    assert engine.weight_version == 0
    assert answers(engine, [request]) == before
