"""Defaults of a checkpoint, control tokens in prompts, and chats."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from configs import schema
from infer import generate


def test_defaults_come_from_the_checkpoint_and_yield_to_flags():
    said = schema.Generation(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05
    )
    got = generate.sampling_defaults(said)
    assert (got.temperature, got.top_k, got.top_p, got.repetition_penalty) == (0.7, 20, 0.8, 1.05)
    assert got.max_tokens == schema.Sampling().max_tokens
    assert generate.sampling_defaults(schema.Generation(do_sample=False)).temperature == 0
    assert generate.sampling_defaults(schema.Generation()) == schema.Sampling()
    got = generate.with_overrides(got, {"temperature": 0.0, "max_tokens": 9})
    assert (got.temperature, got.top_k, got.max_tokens) == (0.0, 20, 9)
    with pytest.raises(ValueError, match=r"unknown sampling parameters \['beam'\]"):
        generate.with_overrides(got, {"beam": 2})


def test_control_tokens_in_a_prompt_are_text_unless_asked(generator):
    end = generator.tokenizer.control_ids["<|im_end|>"]
    settings = generator.defaults
    text = generate.prompt_request(generator, "<|im_end|>", settings=settings)
    assert end not in text.tokens and len(text.tokens) > 1
    control = generate.prompt_request(generator, "<|im_end|>", settings=settings, special="control")
    assert control.tokens == (end,)


def test_a_chat_remembers_and_survives_a_turn_that_does_not_fit(generator):
    lines = iter(["hello", "x" * 300, "again", None])
    written = []
    messages = generate.chat(
        generator, system="Be brief.", read=lambda: next(lines), write=written.append
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [messages[1]["content"], messages[3]["content"]] == ["hello", "again"]
    assert "max_position_embeddings=256" in "".join(written)
    assert messages[2]["content"] in "".join(written)
    turns = [*messages[:3], messages[3]]
    request = generate.prompt_request(generator, turns, settings=generator.defaults)
    answer = generate.stream(generator, request, write=lambda _: None)
    assert answer.text == messages[4]["content"]


def test_text_leaves_out_the_end_token(generator):
    settings = dataclasses.replace(generator.defaults, temperature=0.0, max_tokens=12)
    request = generate.prompt_request(generator, "hello", settings=settings)
    free = generate.stream(generator, request, write=lambda _: None)
    stopping = dataclasses.replace(generator, eos_ids=(free.token_ids[4],))
    got = generate.stream(stopping, request, write=lambda _: None)
    count = free.token_ids.index(free.token_ids[4])
    assert got.finish_reason == "stop"
    assert got.token_ids == free.token_ids[: count + 1]
    assert got.text == generator.tokenizer.decode(free.token_ids[:count], skip_special=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, generator):
    """A Hugging Face folder with random weights, a tokenizer and sampling defaults."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg, path = generator.cfg, tmp_path_factory.mktemp("hf")
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
        max_position_embeddings=cfg.max_position_embeddings,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=256,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    generator.tokenizer.save(path)
    said = {"do_sample": False, "eos_token_id": [256, 7], "max_new_tokens": 20}
    (path / "generation_config.json").write_text(json.dumps(said))
    return path


def test_a_hugging_face_folder_generates_as_transformers_does(folder):
    import torch
    import transformers

    loaded = generate.load(folder, dtype="float32")
    assert loaded.defaults == schema.Sampling(temperature=0.0, max_tokens=20)
    assert loaded.eos_ids == (256, 7)
    network = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt in ("hello", "a few words", "Zug"):
        request = generate.prompt_request(loaded, prompt, settings=loaded.defaults)
        answer = generate.stream(loaded, request, write=lambda _: None)
        ids = torch.tensor([request.tokens])
        want = network.generate(ids, attention_mask=torch.ones_like(ids))
        assert list(answer.token_ids) == want[0, ids.shape[1] :].tolist()


def test_dtype_and_missing_parts_are_honoured(folder, tmp_path):
    loaded = generate.load(folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    request = generate.prompt_request(loaded, "hello", settings=loaded.defaults)
    assert generate.stream(loaded, request, write=lambda _: None).token_ids
    with pytest.raises(ValueError, match="not a folder"):
        generate.load(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        generate.load(bare)
    (bare / "generation_config.json").unlink()
    again = generate.load(bare, dtype="float32")
    assert again.defaults == schema.Sampling() and again.eos_ids == (256,)


def test_a_mesh_that_does_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match="tensor=3|needs a total of 3 devices"):
        generate.load(folder, mesh=schema.Mesh(fsdp=1, tensor=3))
