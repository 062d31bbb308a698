"""Defaults of a checkpoint, control tokens in prompts, and chats."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import pytest

from configs.engine import EngineConfig
from configs.mesh import MeshConfig
from configs.models.architecture import GenerationConfig
from configs.sampling import SamplingParams
from infer.text import generate, loading
from infer.text.service import TextRequest
from tests.infer import whole_forward


def test_defaults_come_from_the_checkpoint_and_yield_to_flags():
    said = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05
    )
    got = loading.sampling_defaults(said)
    assert (got.temperature, got.top_k, got.top_p, got.repetition_penalty) == (0.7, 20, 0.8, 1.05)
    assert got.max_tokens == SamplingParams().max_tokens
    assert loading.sampling_defaults(GenerationConfig(do_sample=False)).temperature == 0
    assert loading.sampling_defaults(GenerationConfig()) == SamplingParams()
    got = loading.with_overrides(got, {"temperature": 0.0, "max_tokens": 9})
    assert (got.temperature, got.top_k, got.max_tokens) == (0.0, 20, 9)
    with pytest.raises(ValueError, match=r"unknown sampling parameters \['beam'\]"):
        loading.with_overrides(got, {"beam": 2})


ALONE = EngineConfig(num_slots=1, num_pages=8, prefill_chunk=64, prefill_tokens=64)


@pytest.fixture(scope="module")
def service(loaded):
    return loading.serve(loaded, settings=ALONE)


def write(text: str) -> None:
    """Nowhere."""


def test_control_tokens_in_a_prompt_are_text_unless_asked(service):
    end = service.tokenizer.control_ids["<|im_end|>"]

    def tokens(**how) -> tuple[int, ...]:
        return tuple(
            service.encode(
                TextRequest(id="", prompt="<|im_end|>", sampling=service.defaults, **how)
            )
        )

    assert end not in tokens() and len(tokens()) > 1
    assert tokens(special="control") == (end,)


def test_a_chat_remembers_and_survives_a_turn_that_does_not_fit(service):
    lines = iter(["hello", "x" * 300, "again", None])
    written = []
    messages = generate.chat(
        service,
        settings=service.defaults,
        system="Be brief.",
        read=lambda: next(lines),
        write=written.append,
    )
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [messages[1]["content"], messages[3]["content"]] == ["hello", "again"]
    assert "max_position_embeddings=256" in "".join(written)
    assert messages[2]["content"] in "".join(written)
    answer = generate.stream(service, messages[:4], settings=service.defaults, write=write)
    assert answer.text == messages[4]["content"]


def test_text_leaves_out_the_end_token(loaded, service):
    settings = dataclasses.replace(service.defaults, temperature=0.0, max_tokens=12)
    free = generate.stream(service, "hello", settings=settings, write=write)
    tokens = service.encode(TextRequest(id="", prompt="hello", sampling=settings))
    assert list(free.token_ids) == whole_forward.answer(loaded, tokens, settings=settings)
    stopping = dataclasses.replace(settings, stop_token_ids=(free.token_ids[4],))
    written = []
    got = generate.stream(service, "hello", settings=stopping, write=written.append)
    count = free.token_ids.index(free.token_ids[4])
    assert got.finish_reason == "stop"
    assert got.token_ids == free.token_ids[: count + 1]
    assert got.text == "".join(written)
    assert got.text == service.tokenizer.decode(free.token_ids[:count], skip_special=True)


def test_a_hugging_face_folder_generates_as_transformers_does(hf_folder):
    import torch
    import transformers

    loaded = loading.load_model(hf_folder, dtype="float32")
    assert loaded.defaults == SamplingParams(temperature=0.0, max_tokens=20)
    assert loaded.eos_ids == (256, 7)
    network = transformers.Qwen2ForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    service = loading.serve(loaded, settings=ALONE)
    for prompt in ("hello", "a few words", "Zug"):
        answer = generate.stream(service, prompt, settings=loaded.defaults, write=write)
        ids = torch.tensor([service.tokenizer.encode(prompt)])
        want = network.generate(ids, attention_mask=torch.ones_like(ids))
        assert list(answer.token_ids) == want[0, ids.shape[1] :].tolist()


def test_dtype_and_missing_parts_are_honoured(hf_folder, tmp_path):
    loaded = loading.load_model(hf_folder, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype("bfloat16")}
    service = loading.serve(loaded, settings=ALONE)
    assert generate.stream(service, "hello", settings=loaded.defaults, write=write).token_ids
    with pytest.raises(ValueError, match="not a folder"):
        loading.load_model(tmp_path / "nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(hf_folder, bare)
    (bare / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        loading.load_model(bare)
    (bare / "generation_config.json").unlink()
    again = loading.load_model(bare, dtype="float32")
    assert again.defaults == SamplingParams() and again.eos_ids == (256,)


def test_a_mesh_that_does_not_divide_is_refused(hf_folder):
    with pytest.raises(ValueError, match="tensor=3|needs a total of 3 devices"):
        loading.load_model(hf_folder, mesh=MeshConfig(fsdp=1, tensor=3))
