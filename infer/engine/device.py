"""The device's side of an engine: its arrays, and the table of its programs.

Every program that an engine can dispatch is a row of one table, by name. Warm-up compiles and runs
the rows with padding, lowering for a device that is elsewhere takes shapes in place of arrays, and
a dispatch runs what was compiled: a program of any other shape cannot be run.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from infer.engine import buckets, scheduler
from infer.engine.padding import Padding
from infer.speculation.draft import Draft
from infer.speculation.proposers import DraftChunk
from partitioning.sharding import Layout
from qwen_jax.decode import draft_programs, forward, programs, sampling, slot_state
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import kv_pages

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


def _prefill_name(rows: int, length: int, *, prefix: str, score: str) -> str:
    return f"prefill {rows} x {length}, prefix {prefix}, scores {score}"


def _decode_name(rows: int, *, sampler: str, num_steps: int) -> str:
    return f"decode {rows}, {num_steps} steps, {sampler}"


def _verify_name(rows: int, *, sampler: str) -> str:
    return f"verify draft tokens of {rows}, {sampler}"


def _read_draft_name(rows: int, length: int, *, prefix: str) -> str:
    return f"draft model: prefill {rows} x {length}, prefix {prefix}"


def _propose_name(rows: int, *, sampler: str) -> str:
    return f"draft model: propose draft tokens of {rows}, {sampler}"


def _embed_name(length: int) -> str:
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
                name = _prefill_name(rows, length, prefix=prefix, score=score)
                static = {"prefix": prefix, "score": score, "sampler": "full"}
                add(name, programs.prefill, {"chunks": chunks}, **static)
    steps = settings.decode_steps
    for rows in shapes.decode:
        padding = {"slots_R": pad.slots((), num_rows=rows), "mask_RW": pad.masks((), num_rows=rows)}
        # A grammar's mask serves one step.
        for sampler, num_steps in sorted({("greedy", steps), ("full", steps), ("full", 1)}):
            name = _decode_name(rows, sampler=sampler, num_steps=num_steps)
            add(name, programs.advance, padding, sampler=sampler, num_steps=num_steps)
    for rows in _speculation_rows(settings, shapes.decode):
        padding = {
            "slots_R": pad.slots((), num_rows=rows),
            "mask_RW": pad.masks((), num_rows=rows),
            "draft_RT": np.full((rows, settings.guesses), forward.PAD, np.int32),
        }
        for sampler in ("greedy", "full"):
            name = _verify_name(rows, sampler=sampler)
            add(name, programs.verify, padding, sampler=sampler)
    if draft is not None:
        found |= _draft_table(
            draft, settings, pad=pad, vocab_size=cfg.vocab_size, attention=attention
        )
    return found | _embed_table(cfg, dtype=dtype, layout=layout)


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
            found[_read_draft_name(rows, length, prefix=prefix)] = Program(
                function=draft_programs.read,
                static={**common, "prefix": prefix},
                arrays=own,
                padding=pad.reads((), num_rows=rows, length=length),
                replaces="draft_pages",
                layout=draft.layout,
            )
    for rows in _speculation_rows(settings, shapes.decode):
        for sampler in ("greedy", "full"):
            found[_propose_name(rows, sampler=sampler)] = Program(
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


def _embed_lengths(cfg: ModelConfig) -> tuple[int, ...]:
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
        _embed_name(length): Program(
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
        for length in _embed_lengths(cfg)
    }


def _speculation_rows(settings: EngineConfig, decode_rows: Sequence[int]) -> list[int]:
    """Numbers of rows for which draft tokens may be asked."""
    if settings.speculation == "off":
        return []
    most = buckets.round_up(min(settings.speculation_rows, settings.num_slots), decode_rows)
    return [rows for rows in decode_rows if rows <= most]


class Device:
    """Arrays of one engine, and its programs, each compiled once."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: DecodeWeights,
        *,
        settings: EngineConfig,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: forward.Attention | None,
        layout: Layout | None,
        draft: Draft | None,
    ):
        """`settings` have their num_pages and max_length."""
        self._cfg, self._has_draft = cfg, draft is not None
        self._pad = Padding(cfg, settings)
        sizes = {
            "num_pages": settings.num_pages,
            "page_size": settings.page_size,
            "dtype": dtype,
            "storage": settings.kv_cache,
        }
        state = slot_state.empty(
            cfg, num_slots=settings.num_slots, width=self._pad.width, layout=layout, **sizes
        )
        self._arrays: dict[str, Any] = {
            "params": params,
            "state": state,
            "eos_E": np.asarray(tuple(eos_ids), np.int32),
        }
        if draft is not None:
            self._arrays["draft_params"] = draft.params
            self._arrays["draft_pages"] = kv_pages.create(draft.cfg, layout=draft.layout, **sizes)
        self._where = None if layout is None else jax.NamedSharding(layout.mesh, jax.P())
        self._allow_all: dict[int, jax.Array] = {}  # masks that allow all tokens, by rows
        self.programs = table(
            cfg, settings, dtype=dtype, attention=attention, layout=layout, draft=draft
        )
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    @property
    def num_compiled(self) -> int:
        """Programs of this engine compiled so far."""
        return len(self._compiled)

    def warm_up(self, *, show: Callable[[str], None]) -> None:
        """Compiles the programs of the table that requests can need, and runs each on padding.

        As many are compiled at a time as there are cores, 16 at most; `show` is told of each.
        """

        def compile(name: str) -> tuple[str, float]:
            began = time.monotonic()
            self.compile(name)
            return name, time.monotonic() - began

        names = [name for name, row in self.programs.items() if row.compile_at == "warm_up"]
        missing = [name for name in names if name not in self._compiled]
        pool = futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            jobs = [pool.submit(compile, name) for name in missing]
            for count, job in enumerate(futures.as_completed(jobs), 1):
                name, seconds = job.result()
                show(f"compiled {count} of {len(jobs)}: {name}, {seconds:.1f} s")
        finally:
            pool.shutdown(cancel_futures=True)
        for name in names:
            jax.block_until_ready(self.run(name, **self.programs[name].padding))

    def compile(self, name: str) -> None:
        """Compiles a program of the table; in any thread, while none is dispatched."""
        compiled = self.programs[name].lower(self._own()).compile()
        with self._lock:
            assert name not in self._compiled, f"{name} compiled twice"
            self._compiled[name] = compiled

    def run(self, name: str, /, **arguments) -> tuple:
        """Dispatches a program of the table -> its outputs, but for the array that it replaces."""
        program = self.programs[name]
        if name not in self._compiled:
            self.compile(name)
        own = self._own()
        kept = {argument: own[name] for argument, name in program.arrays.items()}
        outputs = self._compiled[name](**kept, **arguments)
        if type(outputs) is not tuple:
            outputs = (outputs,)
        if program.replaces is None:
            return outputs
        self._arrays[program.replaces] = outputs[0]
        return outputs[1:]

    def _own(self) -> dict[str, Any]:
        return {**self._arrays, "slots": self._arrays["state"].slots}

    # -- dispatches

    def prefill(
        self, work: scheduler.Prefill, masks: Sequence[np.ndarray | None], *, score: str
    ) -> tuple:
        """Prefills chunks on both models -> tokens drawn, and logprobs of the prompts or None."""
        shape, prefix = (work.num_rows, work.length), "none" if work.fresh else "pages"
        chunks = self._pad.chunks(work, masks)
        drawn, scored = self.run(_prefill_name(*shape, prefix=prefix, score=score), chunks=chunks)
        if self._has_draft:
            names = ("tokens_RT", "starts_R", "lengths_R", "table_RM")
            reads = {name: getattr(chunks, name) for name in names}
            self.run(_read_draft_name(*shape, prefix=prefix), **reads)
        return drawn, scored

    def decode(
        self,
        slots: Sequence[int],
        masks: Sequence[np.ndarray | None],
        *,
        num_rows: int,
        sampler: str,
        num_steps: int,
    ) -> sampling.Drawn:
        """Draws up to `num_steps` tokens for these slots -> leaves [steps, R]."""
        name = _decode_name(num_rows, sampler=sampler, num_steps=num_steps)
        slots_R = self._pad.slots(slots, num_rows=num_rows)
        (drawn,) = self.run(name, slots_R=slots_R, mask_RW=self._masks(masks, num_rows=num_rows))
        return drawn

    def verify(
        self, slots: Sequence[int], draft_RT: np.ndarray | jax.Array, *, sampler: str
    ) -> sampling.Drawn:
        """Draws a token more than the draft tokens that come true -> leaves [T + 1, R]."""
        num_rows = draft_RT.shape[0]
        (drawn,) = self.run(
            _verify_name(num_rows, sampler=sampler),
            slots_R=self._pad.slots(slots, num_rows=num_rows),
            mask_RW=self._masks((), num_rows=num_rows),
            draft_RT=draft_RT,
        )
        return drawn

    def propose(self, slots: Sequence[int], *, num_rows: int, sampler: str) -> jax.Array:
        """The draft model's tokens for these slots, [R, T], on the device."""
        slots_R = self._pad.slots(slots, num_rows=num_rows)
        (draft_RT,) = self.run(_propose_name(num_rows, sampler=sampler), slots_R=slots_R)
        return draft_RT

    def read_draft(self, chunks: Sequence[DraftChunk], *, num_rows: int, length: int) -> None:
        """Has the draft model alone read chunks, whose pages hold what comes before them."""
        reads = self._pad.reads(chunks, num_rows=num_rows, length=length)
        self.run(_read_draft_name(num_rows, length, prefix="pages"), **reads)

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """Final hidden state of the last token, scaled to length 1: [D] in float32."""
        lengths = _embed_lengths(self._cfg)
        length = buckets.round_up(len(tokens), lengths)
        tokens_1T = np.zeros((1, length), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        (hidden_1D,) = self.run(
            _embed_name(length), tokens_RT=tokens_1T, lengths_R=np.asarray([len(tokens)], np.int32)
        )
        return np.asarray(hidden_1D[0])

    def _masks(
        self, masks: Sequence[np.ndarray | None], *, num_rows: int
    ) -> np.ndarray | jax.Array:
        if any(mask is not None for mask in masks):
            return self._pad.masks(masks, num_rows=num_rows)
        if num_rows not in self._allow_all:  # kept on the device: it is large, and asked for often
            mask_RW = self._pad.masks((), num_rows=num_rows)
            self._allow_all[num_rows] = jax.device_put(mask_RW, self._where)
        return self._allow_all[num_rows]
