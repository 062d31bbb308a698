"""Defaults of a checkpoint, control tokens in prompts, and chats."""

import dataclasses

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
