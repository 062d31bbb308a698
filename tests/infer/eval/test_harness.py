"""lm-evaluation-harness over our engine, beside its own `hf` backend."""

import json
import math
import types

import hypothesis
import pytest
from hypothesis import strategies as st

from configs.engine import EngineConfig
from configs.sampling import SamplingParams
from infer.eval.service_backend import ServiceBackend
from infer.text import loading
from qwen_jax.tasks import gsm8k
from qwen_jax.tasks import task as task_lib
from qwen_jax.tasks.backend import GenerationRequest, Score
from qwen_jax.text import tokenizer_training
from qwen_jax.text.chat import encoding as chat
from tests.infer.eval import standin
from tests.support import real_checkpoint

pytest.importorskip("lm_eval")
from infer.eval import harness  # noqa: E402 (the extra `eval`)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


ENGINE = EngineConfig(
    num_slots=4, page_size=16, num_pages=128, prefill_chunk=256, prefill_tokens=256, buckets="one"
)


def instances(*arguments: tuple) -> list:
    return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def words():
    return tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)


class Recording(standin.Fake):
    """Keeps what it is asked, and scores each token by its number."""

    def __init__(self, tokenizer, **options) -> None:
        super().__init__(tokenizer, **options)
        self.pairs, self.prompts = [], []

    def loglikelihood(self, pairs):
        for index, pair in reversed(list(enumerate(pairs))):
            self.pairs.append(pair)
            yield index, Score(-float(sum(pair.continuation)), len(pair.continuation) == 1)

    def generate(self, prompts):
        self.prompts = list(prompts)
        return super().generate(self.prompts)


def test_scores_come_in_the_order_of_their_questions(words):
    backend = Recording(words)
    model = harness.LanguageModel(backend, name="tiny")
    pairs = [("a few", " words"), ("", "a"), ("a ", "few"), ("a few", " w")]
    got = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    whole = [words.encode(a + b)[len(words.encode(a.rstrip())) :] for a, b in pairs]
    assert got == [(-float(sum(tokens)), len(tokens) == 1) for tokens in whole]
    assert backend.pairs[2].context == (words.eos_ids[0],)


def test_long_texts_are_read_in_windows(words):
    backend = Recording(words, max_length=9)
    model = harness.LanguageModel(backend, name="tiny")
    assert model.max_length == 8
    tokens = words.encode("xyz" * 7)
    got = model.loglikelihood_rolling(instances(("xyz" * 7,), ("",)), disable_tqdm=True)
    assert got == [-float(sum(tokens)), 0.0]
    windows = backend.pairs[::-1]
    assert [len(w.continuation) for w in windows] == [8, 8, 5]
    assert all(len(w.context) + len(w.continuation) <= 9 for w in windows)
    assert windows[0].context == (words.eos_ids[0],) and len(windows[2].context) == 4


def test_a_context_that_is_too_long_loses_its_beginning(words):
    backend = Recording(words, max_length=12)
    model = harness.LanguageModel(backend, name="tiny")
    model.loglikelihood(instances(("x" * 40, "yz")), disable_tqdm=True)
    [pair] = backend.pairs
    assert len(pair.context) + len(pair.continuation) == 12
    given = {"until": [], "max_gen_toks": 4, "do_sample": False}
    model.generate_until(instances(("x" * 40, given)), disable_tqdm=True)
    assert len(backend.prompts[0].tokens) == 7
    with pytest.raises(ValueError, match="max_gen_toks=11 leaves no room"):
        model.generate_until(instances(("x", {**given, "max_gen_toks": 11})), disable_tqdm=True)


def test_generation_settings_are_honoured_or_refused(words):
    backend = Recording(words, max_length=1024)
    settings = SamplingParams(top_p=0.5, temperature=0.5)
    model = harness.LanguageModel(backend, name="tiny", settings=settings)

    def asked(**given) -> GenerationRequest:
        model.generate_until(instances(("<|im_end|>", given)), disable_tqdm=True)
        return backend.prompts[0]

    greedy = asked(until=["\n", ""], do_sample=False, top_p=0.9)
    assert greedy.stop == ("\n",) and greedy.tokens == (words.control_ids["<|im_end|>"],)
    assert greedy.sampling == SamplingParams(max_tokens=256, temperature=0.0, top_p=0.5)
    drawn = asked(until="x", do_sample=True, temperature=0.9, top_k=3, max_gen_toks=7)
    assert drawn.sampling == SamplingParams(max_tokens=7, temperature=0.9, top_k=3, top_p=0.5)
    with pytest.raises(ValueError, match=r"generation_kwargs \['num_beams'\] are unknown"):
        asked(until=[], num_beams=2)


def test_chat_templates_are_those_of_our_own_encoding(words):
    model = harness.LanguageModel(Recording(words), name="some/model")
    turns = [{"role": "user", "content": "hello"}]
    text = model.apply_chat_template(turns)
    want = chat.encode(turns, tokenizer=words, add_generation_prompt=True, mask="none")
    assert model.tok_encode(text) == want.token_ids
    begun = [*turns, {"role": "assistant", "content": "It is"}]
    opened = model.apply_chat_template(begun, add_generation_prompt=False)
    assert opened == f"{text}It is"
    assert "im_start" in model.chat_template(True) and model.chat_template(False) is None
    assert model.tokenizer_name == f"some__model--{words.fingerprint}"


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text("#### 0123456789.,$-ab\n", max_size=24))
def test_gsm8k_is_judged_as_the_harness_does(text):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    patterns = {
        "strict": (r"#### (\-?[0-9\.\,]+)", 0),
        "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    }
    record = {"question": "", "answer": "so\n#### 1,000"}
    item = task_lib.Item(id="1", question="", record=record, texts=())
    task = gsm8k.Gsm8k(name="gsm8k", items=(item,), style="plain")
    got = task.grade(item, task_lib.Answer(texts=(text,))).metrics
    for name, (pattern, select) in patterns.items():
        [[found]] = RegexFilter(pattern, group_select=select).apply([[text]], [{}])
        match = exact_match_hf_evaluate(
            predictions=[found],
            references=[item.record["answer"]],
            regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"],
            ignore_case=True,
        )
        assert got[name] == (match["exact_match"],), (name, found)


def evaluate(model, tasks: list[str], folder, *, chat: bool) -> dict:
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


def ours(folder) -> harness.LanguageModel:
    service = loading.load(folder, settings=ENGINE, sampling={}, dtype="float32")
    return harness.LanguageModel(ServiceBackend(service, max_length=256, num_open=8), name="tiny")


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    return real_checkpoint.build(tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # of the harness and its libraries
@pytest.mark.parametrize("folder", ["model_folder", "trained_folder"])
def test_numbers_equal_those_of_the_hf_backend(request, folder, task_folder, tmp_path, monkeypatch):
    model_folder = request.getfixturevalue(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    import transformers
    from lm_eval.models.huggingface import HFLM

    # `AutoTokenizer` cuts any text of a "qwen2" as Qwen2.5 does, whatever tokenizer.json says; the
    # trained model's says otherwise.
    cutter = transformers.PreTrainedTokenizerFast.from_pretrained(model_folder)
    # One position is for the token that a score ends with; see `LanguageModel.max_length`.
    peer = HFLM(
        str(model_folder),
        tokenizer=cutter,
        device="cpu",
        dtype="float64",  # its log-probabilities in float32 are off by up to 4e-4, more than ours
        batch_size=4,
        max_length=255,
    )
    model = ours(model_folder)
    for chat_on in (False, True):
        tasks = ["local_choice", "local_writing"] + ["local_rolling"] * (not chat_on)
        want = evaluate(peer, tasks, task_folder, chat=chat_on)
        got = evaluate(model, tasks, task_folder, chat=chat_on)
        for task in tasks:
            compare(got, want, task)


def compare(got: dict, want: dict, task: str) -> None:
    samples = list(zip(got["samples"][task], want["samples"][task], strict=True))
    assert len(samples) >= 12
    for mine, theirs in samples:
        assert json.dumps(mine["arguments"]) == json.dumps(theirs["arguments"])
        for (a,), (b,) in zip(mine["resps"], theirs["resps"], strict=True):
            if task == "local_writing":
                assert a == b
                continue
            (a, *greedy), (b, *also) = (a, b) if isinstance(b, tuple) else ((a,), (b,))
            assert a == pytest.approx(b, abs=1e-4, rel=1e-6)
            assert greedy == also
    for name, value in want["results"][task].items():
        mine = got["results"][task][name]
        if task == "local_rolling" and isinstance(value, float):
            assert math.isclose(mine, value, rel_tol=1e-5)
        else:
            assert mine == value, name
