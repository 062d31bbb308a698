"""`qwen-jax quantize`: what it writes answers as the quantised parameters do, and is verified."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.engine import EngineConfig
from configs.models import qwen2_5, qwen2_moe
from infer.text import generate, loading
from qwen_jax.analysis import quantisation
from qwen_jax.checkpoint import load, tensor_table
from qwen_jax.checkpoint.huggingface import exporter
from qwen_jax.checkpoint.quantised import quantised_params
from qwen_jax.cli import main
from qwen_jax.model import transformer
from qwen_jax.quant import array
from qwen_jax.text import tokenizer_training

CFG = dataclasses.replace(
    qwen2_5.tiny(),
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    max_position_embeddings=256,
)
SPARSE = dataclasses.replace(qwen2_moe.tiny(), vocab_size=320)


def drawn(cfg) -> dict:
    leaves, structure = jax.tree.flatten(transformer.shapes(cfg))
    rng = np.random.default_rng(0)
    return structure.unflatten(
        [jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32) for leaf in leaves]
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A native checkpoint with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    words = tokenizer_training.train_bpe(["a few words, to have a corpus"], vocab_size=278)
    words.save(folder / "assets")
    quantisation.save(CFG, drawn(CFG), folder / "native", assets=folder / "assets", source={})
    return folder / "native"


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["qwen-jax", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (
            ("--weights", "int4", "--group-size", "32"),
            quantised_params.Settings(weights="int4", group_size=32),
        ),
        pytest.param((), quantised_params.Settings(), marks=pytest.mark.slow),
        pytest.param(
            ("--weights", "fp8", "--output-layer", "keep"),
            quantised_params.Settings(weights="fp8", output="keep"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_command(monkeypatch, capsys, tmp_path, plain, flags, settings):
    text = tmp_path / "text"
    text.write_text("a few words, to have a corpus. " * 20)
    out = str(tmp_path / "quantised")
    arguments = (*flags, "--text", str(text), "--dtype", "float32")
    code, said = run(monkeypatch, capsys, "quantize", str(plain), out, *arguments)
    assert code == 0, said
    before, after = map(float, re.search(r"tokens (\S+) -> (\S+) nats", said).groups())
    assert 0 < abs(after - before) < 0.3
    assert run(monkeypatch, capsys, "checkpoint", "verify", out)[0] == 0

    want = quantised_params.quantise(CFG, drawn(CFG), settings)
    got = load.load_params(out, dtype="float32")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()

    engine = EngineConfig(num_slots=1, num_pages=4)
    asked = {"temperature": 0, "max_tokens": 6}
    service = loading.load(out, settings=engine, sampling=asked, dtype="float32")
    prompt = service.tokenizer.encode("a few")
    tokens = generate.stream(
        service, "a few", settings=service.defaults, write=lambda _: None
    ).token_ids
    whole = jnp.asarray([[*prompt, *tokens]])
    logits_BTV = transformer.unembed(CFG, want, transformer.apply(CFG, want, whole).hidden_BTD)
    start = len(prompt) - 1
    assert tokens == tuple(np.argmax(logits_BTV[0, start:-1], axis=-1).tolist())


def test_experts_are_quantised_and_gates_are_not(tmp_path):
    params = quantised_params.quantise(
        SPARSE, drawn(SPARSE), quantised_params.Settings(weights="int4", group_size=32)
    )
    flat = tensor_table.flatten(params)
    kept = {path for path, value in flat.items() if not array.is_quantised(value)}
    assert {"layers.moe.router.kernel", "layers.moe.shared_gate.kernel"} <= kept
    assert flat["layers.moe.experts.down.kernel"].values.dtype == jnp.uint8
    quantisation.save(SPARSE, params, tmp_path / "c", assets=None, source={})
    again = load.load_params(tmp_path / "c")
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_what_cannot_be_is_refused(monkeypatch, capsys, tmp_path, plain):
    out = tmp_path / "out"
    code, said = run(
        monkeypatch, capsys, "quantize", str(plain), str(out), "--weights", "int4",
        "--group-size", "64",
    )  # fmt: skip
    assert code == 2 and "layers.mlp.down.kernel: 96 inputs are no multiple of" in said
    assert not out.exists()
    quantisation.quantise_checkpoint(plain, out, quantised_params.Settings())
    with pytest.raises(ValueError, match="out exists already"):
        quantisation.quantise_checkpoint(plain, out, quantised_params.Settings())
    for act in (
        lambda: quantisation.quantise_checkpoint(
            out, tmp_path / "again", quantised_params.Settings()
        ),
        lambda: exporter.export_checkpoint(out, tmp_path / "hf"),
    ):
        with pytest.raises(ValueError, match="is quantised, for inference alone"):
            act()
