"""Every example of `examples/` and every Python snippet of the README runs as it stands."""

import dataclasses
import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from configs.models import presets
from qwen_jax.text import tokenizer_training

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
CHECKPOINT = "Qwen2.5-0.5B-Instruct"  # the folder that the README downloads


@pytest.fixture(scope="module")
def example():
    """Imports an example by its name, beside its siblings, as Python does for a script."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def model(example, tmp_path_factory):
    """A Hugging Face folder of random weights with the tokenizer of the examples."""
    from tests.support import hf_folder

    pretrain = example("pretrain_tiny")
    made = tmp_path_factory.mktemp("examples")
    documents = pretrain.write_corpus(made / "corpus.jsonl")
    tokenizer = tokenizer_training.train_bpe(documents, vocab_size=pretrain.VOCAB_SIZE)
    cfg = dataclasses.replace(presets.preset("tiny"), vocab_size=pretrain.VOCAB_SIZE)
    return hf_folder.write(made / "tiny", cfg, tokenizer=tokenizer)


def test_all_examples_are_here():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"tiny_model"}
    assert scripts == {
        "pretrain_tiny", "convert_both_ways", "batch_answers", "evaluate_task", "serve_and_ask",
        "plan_run",
    }  # fmt: skip
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"python examples/{name}.py" in table for name in scripts)


@pytest.mark.slow  # half a minute: compiles a training step twice
def test_pretrain(example, tmp_path):
    exported = example("tiny_model").make(tmp_path)
    metrics = (tmp_path / "pretrain" / "run" / "metrics.jsonl").read_text()
    assert '"step": 20' in metrics and '"step": 40' in metrics
    assert (exported / "model.safetensors").is_file()


@pytest.mark.takes(25, "transformers writes the model that this file's tests use")
def test_convert(example, model, tmp_path, capsys):
    example("convert_both_ways").main(tmp_path, model)
    shown = capsys.readouterr().out
    assert "verify: 0 problems" in shown and "every byte as it was" in shown


@pytest.mark.slow  # compiles an engine's programs
def test_batch(example, model):
    answers = example("batch_answers").main(model)
    assert {id: len(answer.choices) for id, answer in answers.items()} == {
        "class": 1, "return": 1, "def": 2, "chat": 1,
    }  # fmt: skip
    assert answers["class"].choices[0].text


@pytest.mark.slow  # compiles an engine's programs
def test_evaluate(example, model, tmp_path):
    result = example("evaluate_task").main(tmp_path, model)
    assert result.count == 2 and set(result.metrics) == {"strict", "flexible"}


def test_plan(example, capsys):
    chosen = example("plan_run").main()
    assert chosen.job is not None and "v5p-64" in capsys.readouterr().out


@pytest.mark.slow  # a minute: a server that compiles all its programs
def test_serve(example, model):
    chat, completion = example("serve_and_ask").main(model)
    assert isinstance(chat, str) and completion


def test_the_readme_has_snippets():
    assert len(SNIPPETS) == 2 and all(CHECKPOINT in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, marks=pytest.mark.slow),  # compiles an engine's programs
        1,
    ],
)
def test_readme_snippet(number, model, tmp_path, monkeypatch, capsys):
    shutil.copytree(model, tmp_path / CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()
