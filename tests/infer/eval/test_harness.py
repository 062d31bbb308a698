"""lm-evaluation-harness over our engine, beside its own `hf` backend."""

import json
import math
import types

import pytest

from configs import schema
from infer import engine as engine_lib
from infer import generate
from infer.eval.backend import Prompt, Score
from infer.eval.service_backend import ServiceBackend
from infer.service import Service
from qwen_jax import chat, tokenizer_train
from tests.infer.eval import data, standin

pytest.importorskip("lm_eval")
from infer.eval import harness  # noqa: E402 (the extra `eval`)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def instances(*arguments: tuple) -> list:
    return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def words():
    return tokenizer_train.train_bpe(["a few words, to have a corpus"], vocab_size=278)


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
    settings = schema.Sampling(top_p=0.5, temperature=0.5)
    model = harness.LanguageModel(backend, name="tiny", settings=settings)

    def asked(**given) -> Prompt:
        model.generate_until(instances(("<|im_end|>", given)), disable_tqdm=True)
        return backend.prompts[0]

    greedy = asked(until=["\n", ""], do_sample=False, top_p=0.9)
    assert greedy.stop == ("\n",) and greedy.tokens == (words.control_ids["<|im_end|>"],)
    assert greedy.sampling == schema.Sampling(max_tokens=256, temperature=0.0, top_p=0.5)
    drawn = asked(until="x", do_sample=True, temperature=0.9, top_k=3, max_gen_toks=7)
    assert drawn.sampling == schema.Sampling(max_tokens=7, temperature=0.9, top_k=3, top_p=0.5)
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


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
metadata: {{version: 1.0}}
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """\
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:", "\\n\\n"], do_sample: false, max_gen_toks: 12}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "#### ([0-9]+)"}, {function: take_first}]
  - name: any
    filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, generator):
    """A tiny random model as transformers saves it, with a tokenizer and a chat template."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg, path = generator.cfg, tmp_path_factory.mktemp("model")
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.3,
        max_position_embeddings=256,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=256,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    generator.tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    records = [
        {
            "question": f"{'a longer story about ' * (i % 3)}what is {i} and {i}?",
            "choices": [f"{i}", f"{2 * i} or so", "none of them at all", " an empty word"],
            "gold": i % 4,
            "answer": f"{2 * i}",
        }
        for i in range(12)
    ]
    records[5]["question"] = "a text far beyond what the model can hold " * 14
    file = data.write_lines(folder / "data.jsonl", records)
    for name, body, shots in (
        ("choice", CHOICE, 2), ("rolling", ROLLING, 0), ("writing", WRITING, 1)
    ):  # fmt: skip
        text = TASK.format(name=f"local_{name}", file=file, shots=shots) + body
        (folder / f"{name}.yaml").write_text(text)
    return folder


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
    loaded = generate.load(folder, dtype="float32")
    settings = schema.Engine(
        num_slots=4, page_size=16, num_pages=128, prefill_chunk=256, prefill_tokens=256
    )
    engine = engine_lib.Engine(
        loaded.cfg, loaded.params, settings=settings, eos_ids=loaded.eos_ids, dtype=loaded.dtype
    )
    service = Service(engine, tokenizer=loaded.tokenizer, defaults=loaded.defaults)
    return harness.LanguageModel(ServiceBackend(service, max_length=256, num_open=8), name="tiny")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and its libraries
def test_numbers_equal_those_of_the_hf_backend(model_folder, task_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from lm_eval.models.huggingface import HFLM

    # One position is for the token that a score ends with; see `LanguageModel.max_length`.
    peer = HFLM(str(model_folder), device="cpu", dtype="float32", batch_size=4, max_length=255)
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
