"""Text in, text out: a loaded model with its tokenizer, one prompt streamed, and a chat."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from configs import huggingface, schema
from partitioning import mesh as mesh_lib
from partitioning import rules as rules_lib
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax import chat as chat_lib
from qwen_jax import checkpoint, decode, generation, model, tokenizer

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A model ready to continue text. `load` makes it."""

    cfg: schema.Model
    params: dict  # in a form that `qwen_jax.decode.prepare` makes
    tokenizer: tokenizer.Tokenizer
    defaults: schema.Sampling  # what a request that says nothing gets
    eos_ids: tuple[int, ...]
    dtype: jnp.dtype
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished answer. `token_ids` holds the closing end-of-sequence token, `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


def load(
    path: str | Path, *, dtype: str = "bfloat16", mesh: schema.Mesh | None = None
) -> Generator:
    """The model at `path` with its tokenizer, on one device or on a mesh of all.

    `path` is a Hugging Face folder, a native checkpoint or a training run's output. `dtype`
    (`float32`, `bfloat16`) is that of the weights held and of the arithmetic.
    Where the mesh does not divide a model's experts, ones that are never chosen are added.
    Raises `ValueError` for what cannot be loaded, and for a mesh that does not divide the model.
    """
    found = checkpoint.resolve(path)
    cfg = found.model
    if found.assets is None:
        raise ValueError(
            f"{path} has no tokenizer beside it; import it again from a Hugging Face folder that "
            f"holds one, or put the tokenizer files into {found.path / 'assets'}"
        )
    layout = placed = None
    if mesh is not None:
        rules = rules_lib.rule_set("engine", kv_heads=mesh.kv_heads)
        layout = Layout(mesh_lib.make(mesh), rules)
        cfg = sharding.pad_experts(cfg, layout)
        sharding.check_model(cfg, layout)
        placed = sharding.shardings(model.axes(cfg), layout)
    words = tokenizer.load(found.assets)
    tokenizer.check_vocabulary(words, num_rows=cfg.vocab_size)
    said = _generation_config(found.assets)
    params = checkpoint.load_params(found, shardings=placed, dtype=dtype, model=cfg)
    params = decode.prepare(
        cfg,
        params,
        dtype=jnp.dtype(dtype),
        form=decode.best_form(layout, params=params),
        layout=layout,
    )
    return Generator(
        cfg=cfg,
        params=params,
        tokenizer=words,
        defaults=sampling_defaults(said),
        eos_ids=said.eos_token_ids or cfg.eos_token_ids,
        dtype=jnp.dtype(dtype),
        layout=layout,
    )


def _generation_config(folder: Path) -> schema.Generation:
    path = folder / "generation_config.json"
    if not path.exists():
        return schema.Generation()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return huggingface.read_generation(values)


def sampling_defaults(said: schema.Generation) -> schema.Sampling:
    """generation_config.json's settings; `schema.Sampling`'s defaults where it says nothing.

    `do_sample: false` is temperature 0.
    """
    values = {
        "max_tokens": said.max_new_tokens,
        "temperature": 0.0 if said.do_sample is False else said.temperature,
        "top_k": said.top_k,
        "top_p": said.top_p,
        "min_p": said.min_p,
        "repetition_penalty": said.repetition_penalty,
    }
    return schema.Sampling(**{name: value for name, value in values.items() if value is not None})


def prompt_request(
    generator: Generator,
    prompt: str | Messages,
    *,
    settings: schema.Sampling,
    special: Literal["text", "control"] = "text",
) -> generation.Request:
    """A request for a text or a conversation.

    `special="control"` gives control tokens spelled in a text prompt their ids; otherwise they are
    ordinary text. Raises `ValueError` for a prompt that the model or the template cannot take.
    """
    if isinstance(prompt, str):
        tokens = generator.tokenizer.encode(prompt, special=special)
    else:
        encoded = chat_lib.encode(
            prompt, tokenizer=generator.tokenizer, add_generation_prompt=True, mask="none"
        )
        tokens = encoded.token_ids
    return generation.request(generator.cfg, tokens, settings=settings)


def run(generator: Generator, requests: Sequence[generation.Request]) -> Iterator[generation.Piece]:
    """Tokens of all requests as they come, in one batch."""
    return generation.generate(
        generator.cfg,
        generator.params,
        requests,
        eos_ids=generator.eos_ids,
        dtype=generator.dtype,
        layout=generator.layout,
    )


def stream(
    generator: Generator, request: generation.Request, *, write: Callable[[str], None]
) -> Completion:
    """Writes the answer's text as it becomes complete characters, and returns the whole."""
    decoder = tokenizer.StreamDecoder(generator.tokenizer, skip_special=True)
    token_ids: list[int] = []
    texts = []
    reason: Literal["stop", "length"] = "length"
    for piece in run(generator, [request]):
        token_ids += piece.tokens
        reason = piece.finish_reason or reason
        texts.append(decoder.push(visible(piece)))
        write(texts[-1])
    texts.append(decoder.finish())
    write(texts[-1])
    return Completion(text="".join(texts), token_ids=tuple(token_ids), finish_reason=reason)


def visible(piece: generation.Piece) -> tuple[int, ...]:
    """The piece's tokens without the one that ended the sequence."""
    return piece.tokens[:-1] if piece.finish_reason == "stop" else piece.tokens


def chat(
    generator: Generator,
    *,
    settings: schema.Sampling | None = None,
    system: str | None = None,
    read: Callable[[], str | None],
    write: Callable[[str], None],
) -> list[dict[str, str]]:
    """Turns until `read` gives None; returns the conversation.

    A turn that does not fit is refused in writing, and the conversation stays as it was.
    """
    settings = settings or generator.defaults
    messages = [] if system is None else [{"role": "system", "content": system}]
    while (line := read()) is not None:
        turn = {"role": "user", "content": line}
        try:
            request = prompt_request(generator, [*messages, turn], settings=settings)
        except ValueError as error:
            write(f"{error}\n")
            continue
        answer = stream(generator, request, write=write)
        write("\n")
        messages += [turn, {"role": "assistant", "content": answer.text}]
    return messages


def with_overrides(settings: schema.Sampling, values: dict[str, Any]) -> schema.Sampling:
    """`settings` with some fields replaced. Raises `ValueError` for unknown names or bad values."""
    known = [f.name for f in dataclasses.fields(schema.Sampling)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown sampling parameters {unknown}; known: {', '.join(known)}")
    return dataclasses.replace(settings, **values)
