"""The programs of an engine's device as a table, and the padding of their arguments.

A row names a jitted function with the arguments for which one program of it is compiled. Warm-up
compiles and runs the rows on padding, lowering for a device that is elsewhere takes shapes in place
of arrays, and a dispatch runs what was compiled: a program of any other shape cannot be run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from infer.engine import buckets, scheduler
from infer.speculation.draft import Draft
from infer.speculation.proposers import DraftChunk
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import draft_programs, forward, programs, sampling, slot_state, weights
from qwen_jax.model import transformer

_SHORTEST_EMBED = 16  # tokens of the smallest bucket of prompts to embed


@dataclass(frozen=True, kw_only=True)
class Program:
    """A jitted function, and the arguments for which it is compiled.

    `arrays` says which of the device's own arrays an argument is; the first output takes the place
    of the one that `replaces` names. `padding` holds the arguments that come with a dispatch, as
    arrays of its shapes that belong to no request.
    """

    function: Callable
    static: Mapping[str, Any]
    arrays: Mapping[str, str]
    padding: Mapping[str, Any]
    replaces: str | None
    compile_at: Literal["warm_up", "first_use"] = "warm_up"
    layout: Layout | None = None

    def lower(self, arrays: Mapping[str, Any]) -> jax.stages.Lowered:
        """The program, lowered for these arrays of a device, or for their shapes alone.

        On a mesh the arguments of a dispatch are on every device.
        """
        where = None if self.layout is None else jax.NamedSharding(self.layout.mesh, jax.P())
        padding = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), dict(self.padding)
        )
        own = {argument: arrays[name] for argument, name in self.arrays.items()}
        return self.function.lower(**self.static, **own, **padding)


class Padding:
    """The arguments of dispatches as host arrays, padded to the shapes of programs."""

    def __init__(self, cfg: ModelConfig, settings: EngineConfig) -> None:
        """`settings` have their max_length."""
        self._num_slots = settings.num_slots
        self.width = -(-settings.max_length // settings.page_size)  # pages of a request
        self.words = -(-cfg.vocab_size // 32)  # of a mask of tokens

    def slots(self, slots: Sequence[int], *, num_rows: int) -> np.ndarray:
        """Slot of each row, int32 [R]; rows beyond these have one that does not exist."""
        slots_R = np.full(num_rows, self._num_slots, np.int32)
        slots_R[: len(slots)] = slots
        return slots_R

    def masks(self, masks: Sequence[np.ndarray | None], *, num_rows: int) -> np.ndarray:
        """Bits of allowed tokens, uint32 [R, W]; None, and rows beyond: all are allowed."""
        mask_RW = np.full((num_rows, self.words), 2**32 - 1, np.uint32)
        for row, mask in enumerate(masks):
            if mask is not None:
                mask_RW[row] = mask
        return mask_RW

    def reads(self, chunks: Sequence[DraftChunk], *, num_rows: int, length: int) -> dict:
        """Tokens, pages, starts and lengths of chunks; rows beyond them have length 0."""
        arrays = {
            "tokens_RT": np.zeros((num_rows, length), np.int32),
            "starts_R": np.zeros(num_rows, np.int32),
            "lengths_R": np.zeros(num_rows, np.int32),
            "table_RM": np.zeros((num_rows, self.width), np.int32),
        }
        for row, chunk in enumerate(chunks):
            count = len(chunk.tokens)
            arrays["tokens_RT"][row, :count] = chunk.tokens
            arrays["starts_R"][row], arrays["lengths_R"][row] = chunk.start, count
            arrays["table_RM"][row, : len(chunk.pages)] = chunk.pages
        return arrays

    def chunks(
        self, work: scheduler.Prefill, masks: Sequence[np.ndarray | None]
    ) -> slot_state.Chunks:
        """Arrays of a prefill; rows beyond its chunks have length 0."""
        num_rows, length = work.num_rows, work.length
        reads = [DraftChunk(chunk.pages, chunk.start, chunk.tokens) for chunk in work.chunks]
        requests = [chunk.request for chunk in work.chunks]
        next_RT = np.zeros((num_rows, length), np.int32)
        last_R = np.zeros(num_rows, bool)
        max_tokens_R = np.zeros(num_rows, np.int32)
        seen_RW = np.zeros((num_rows, self.words), np.uint32)
        for row, chunk in enumerate(work.chunks):
            prompt, start = chunk.request.tokens, chunk.start
            following = prompt[start + 1 : start + len(chunk.tokens) + 1]
            next_RT[row, : len(following)] = following
            last_R[row] = chunk.is_last
            max_tokens_R[row] = chunk.request.sampling.max_tokens
            if chunk.is_last:
                seen_RW[row] = self._bits(prompt)
        return slot_state.Chunks(
            **self.reads(reads, num_rows=num_rows, length=length),
            slots_R=self.slots([chunk.slot for chunk in work.chunks], num_rows=num_rows),
            last_R=last_R,
            max_tokens_R=max_tokens_R,
            next_RT=next_RT,
            seen_RW=seen_RW,
            settings=sampling.settings([r.sampling for r in requests], num_rows=num_rows),
            mask_RW=self.masks(masks, num_rows=num_rows),
        )

    def _bits(self, tokens: Sequence[int]) -> np.ndarray:
        """Words with the bit of each token set, uint32 [W]."""
        marked = np.zeros(32 * self.words, bool)
        marked[list(tokens)] = True
        return np.packbits(marked, bitorder="little").view(np.uint32)


def prefill_name(rows: int, length: int, *, prefix: str, score: str) -> str:
    return f"prefill {rows} x {length}, prefix {prefix}, scores {score}"


def decode_name(rows: int, *, sampler: str, num_steps: int) -> str:
    return f"decode {rows}, {num_steps} steps, {sampler}"


def verify_name(rows: int, *, sampler: str) -> str:
    return f"verify draft tokens of {rows}, {sampler}"


def read_draft_name(rows: int, length: int, *, prefix: str) -> str:
    return f"draft model: prefill {rows} x {length}, prefix {prefix}"


def propose_name(rows: int, *, sampler: str) -> str:
    return f"draft model: propose draft tokens of {rows}, {sampler}"


def embed_name(length: int) -> str:
    return f"embed {length}"


def table(
    cfg: ModelConfig,
    settings: EngineConfig,
    *,
    dtype: jnp.dtype,
    attention: forward.Attention | None = None,
    layout: Layout | None = None,
    draft: Draft | None = None,
) -> dict[str, Program]:
    """Every program that an engine of these settings dispatches, by name.

    Arrays of the device: params, state, slots, eos_E, draft_params, draft_pages.
    """
    pad, shapes = Padding(cfg, settings), buckets.shapes(settings)
    common = {"cfg": cfg, "attention": attention, "layout": layout}
    own = {"weights": "params", "state": "state", "eos_E": "eos_E"}
    found: dict[str, Program] = {}

    def add(name: str, function: Callable, padding: dict, **static) -> None:
        found[name] = Program(
            function=function, static={**common, **static}, arrays=own, padding=padding,
            replaces="state", layout=layout,
        )  # fmt: skip

    for rows, length in shapes.prefill:
        empty = scheduler.Prefill(chunks=(), num_rows=rows, length=length)
        chunks = pad.chunks(empty, ())
        for prefix in ("none", "pages"):
            for score in ("no", "prompt"):
                name = prefill_name(rows, length, prefix=prefix, score=score)
                static = {"prefix": prefix, "score": score, "sampler": "full"}
                add(name, programs.prefill, {"chunks": chunks}, **static)
    steps = settings.decode_steps
    for rows in shapes.decode:
        padding = {"slots_R": pad.slots((), num_rows=rows), "mask_RW": pad.masks((), num_rows=rows)}
        # A grammar's mask serves one step.
        for sampler, num_steps in sorted({("greedy", steps), ("full", steps), ("full", 1)}):
            name = decode_name(rows, sampler=sampler, num_steps=num_steps)
            add(name, programs.advance, padding, sampler=sampler, num_steps=num_steps)
    for rows in _speculation_rows(settings, shapes.decode):
        padding = {
            "slots_R": pad.slots((), num_rows=rows),
            "mask_RW": pad.masks((), num_rows=rows),
            "draft_RT": np.full((rows, settings.guesses), forward.PAD, np.int32),
        }
        for sampler in ("greedy", "full"):
            name = verify_name(rows, sampler=sampler)
            add(name, programs.verify, padding, sampler=sampler)
    if draft is not None:
        found |= _draft_table(
            draft, settings, pad=pad, vocab_size=cfg.vocab_size, attention=attention
        )
    return found | _embed_table(cfg, dtype=dtype, layout=layout)


def lower_decode(
    cfg: ModelConfig,
    settings: EngineConfig,
    layout: Layout,
    *,
    num_slots: int,
    length: int,
    dtype: jnp.dtype,
) -> jax.stages.Lowered:
    """The greedy decode of all slots of one engine, lowered for devices that may be elsewhere.

    It draws `settings.decode_steps` tokens for each of `num_slots` slots of `length` positions.
    Raises `ValueError` where the model does not divide over the mesh.
    """
    sharding.check_model(cfg, layout)
    width = -(-length // settings.page_size)
    settings = dataclasses.replace(
        settings,
        num_slots=num_slots,
        max_length=length,
        num_pages=num_slots * width,
        buckets="one",
    )
    state = slot_state.shapes(
        cfg,
        num_slots=num_slots,
        width=width,
        num_pages=settings.num_pages,
        page_size=settings.page_size,
        dtype=dtype,
        layout=layout,
    )
    form = weights.best_form(cfg, dtype=dtype, layout=layout)
    replicated = sharding.sharding((), layout)
    arrays = {
        "params": weights.shapes(cfg, dtype=dtype, form=form, layout=layout),
        "state": state,
        "eos_E": jax.ShapeDtypeStruct((len(cfg.eos_token_ids),), jnp.int32, sharding=replicated),
    }
    name = decode_name(num_slots, sampler="greedy", num_steps=settings.decode_steps)
    return table(cfg, settings, dtype=dtype, layout=layout)[name].lower(arrays)


def _draft_table(
    draft: Draft,
    settings: EngineConfig,
    *,
    pad: Padding,
    vocab_size: int,
    attention: forward.Attention | None,
) -> dict[str, Program]:
    """The draft model's programs; `vocab_size` is the model's."""
    shapes = buckets.shapes(settings)
    common = {"cfg": draft.cfg, "attention": attention, "layout": draft.layout}
    own = {"weights": "draft_params", "pages": "draft_pages"}
    found = {}
    for rows, length in shapes.prefill:
        for prefix in ("none", "pages"):
            found[read_draft_name(rows, length, prefix=prefix)] = Program(
                function=draft_programs.read,
                static={**common, "prefix": prefix},
                arrays=own,
                padding=pad.reads((), num_rows=rows, length=length),
                replaces="draft_pages",
                layout=draft.layout,
            )
    for rows in _speculation_rows(settings, shapes.decode):
        for sampler in ("greedy", "full"):
            found[propose_name(rows, sampler=sampler)] = Program(
                function=draft_programs.propose,
                static={
                    **common,
                    "sampler": sampler,
                    "num_draft_tokens": settings.guesses,
                    "vocab_size": vocab_size,
                },
                arrays={**own, "slots": "slots", "eos_E": "eos_E"},
                padding={"slots_R": pad.slots((), num_rows=rows)},
                replaces="draft_pages",
                layout=draft.layout,
            )
    return found


def embed_lengths(cfg: ModelConfig) -> tuple[int, ...]:
    """Powers of two below the most tokens that the model reads, and that many."""
    most, length = transformer.max_length(cfg), _SHORTEST_EMBED
    lengths = []
    while length < most:
        lengths.append(length)
        length *= 2
    return (*lengths, most)


def _embed_table(
    cfg: ModelConfig, *, dtype: jnp.dtype, layout: Layout | None
) -> dict[str, Program]:
    """The programs that embed one prompt, by its padded length."""
    return {
        embed_name(length): Program(
            function=programs.embed,
            static={"cfg": cfg, "dtype": dtype, "layout": layout},
            arrays={"weights": "params"},
            padding={
                "tokens_RT": np.zeros((1, length), np.int32),
                "lengths_R": np.ones(1, np.int32),
            },
            replaces=None,
            compile_at="first_use",
            layout=layout,
        )
        for length in embed_lengths(cfg)
    }


def _speculation_rows(settings: EngineConfig, decode_rows: Sequence[int]) -> list[int]:
    """Numbers of rows for which draft tokens may be asked."""
    if settings.speculation == "off":
        return []
    most = buckets.round_up(min(settings.speculation_rows, settings.num_slots), decode_rows)
    return [rows for rows in decode_rows if rows <= most]
