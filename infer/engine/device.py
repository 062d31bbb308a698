"""The device's side of an engine: its programs with their state, and padding to their shapes."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from infer.engine import scheduler
from infer.speculation import draft as draft_lib
from partitioning.sharding import Layout
from qwen_jax.decode import forward, sampling, slot_state
from qwen_jax.decode import programs as decode_programs
from qwen_jax.model import transformer

_LEAST = 16  # tokens of the smallest bucket of prompts to embed


@dataclass(frozen=True)
class Program:
    """A program by name: `call` binds it to padding, `run` has the device run it on that."""

    name: str
    call: Callable[[], functools.partial]
    run: Callable[[], object]

    def compile(self) -> None:
        """Leaves the program where a call will find it; in any thread, before any `run`."""
        call = self.call()
        call.func.lower(*call.args, **call.keywords).compile()


class Device:
    """Parameters and state of one engine, with the programs of `qwen_jax/decode/programs.py`."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: dict,
        *,
        settings: EngineConfig,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: forward.Attention | None,
        layout: Layout | None,
        draft: draft_lib.Draft | None,
    ):
        """`settings` have their num_pages and max_length."""
        self._cfg, self._params, self._settings = cfg, params, settings
        self._dtype, self._layout = dtype, layout
        self._common = {
            "eos_E": np.asarray(tuple(eos_ids), np.int32),
            "attention": attention,
            "layout": layout,
        }
        self._width = -(-settings.max_length // settings.page_size)
        self._words = -(-cfg.vocab_size // 32)
        self._allowed: dict[int, jax.Array] = {}  # masks that allow all, by number of rows
        self._state = slot_state.empty(
            cfg,
            num_slots=settings.num_slots,
            width=self._width,
            num_pages=settings.num_pages,
            page_size=settings.page_size,
            dtype=dtype,
            storage=settings.kv_cache,
            layout=layout,
        )

        self._draft = draft and draft_lib.DraftDevice(
            draft,
            settings=settings,
            vocab_size=cfg.vocab_size,
            eos_ids=eos_ids,
            dtype=dtype,
            attention=attention,
        )

    def prefill(
        self, work: scheduler.Prefill, masks: Sequence[np.ndarray | None], *, score: str
    ) -> tuple:
        """`paged_decode.prefill` on the state -> what was drawn, and scores or None."""
        prefix = "none" if work.fresh else "pages"
        return self._prefill(self._chunks(work, masks), prefix=prefix, score=score)

    def _prefill(self, chunks: slot_state.Chunks, *, prefix: str, score: str) -> tuple:
        self._state, drawn, scored = self._reading(chunks, prefix=prefix, score=score)()
        if self._draft is not None:
            self._draft.read(chunks, prefix=prefix)
        return drawn, scored

    def _reading(self, chunks: slot_state.Chunks, **options) -> functools.partial:
        return functools.partial(
            decode_programs.prefill, self._cfg, self._params, self._state, chunks, sampler="full",
            **options, **self._common,
        )  # fmt: skip

    def advance(
        self, slots: Sequence[int], masks: Sequence[np.ndarray | None], *, rows: int, **options
    ) -> sampling.Drawn:
        """`paged_decode.advance` on the state, for these slots in a bucket of `rows`."""
        self._state, drawn = self._advancing(slots, masks, rows=rows, **options)()
        return drawn

    def _advancing(
        self, slots: Sequence[int], masks: Sequence[np.ndarray | None], *, rows: int, **options
    ) -> functools.partial:
        slots_R, mask_RW = self._padded(slots, rows), self._masks(masks, rows=rows)
        return functools.partial(
            decode_programs.advance, self._cfg, self._params, self._state, slots_R, mask_RW,
            **options, **self._common,
        )  # fmt: skip

    def verify(
        self, slots: Sequence[int], guesses_RT: np.ndarray | jax.Array, *, sampler: sampling.Sampler
    ) -> sampling.Drawn:
        """`paged_decode.verify` on the state, for these slots in a bucket of R rows."""
        self._state, drawn = self._verifying(slots, guesses_RT, sampler=sampler)()
        return drawn

    def _verifying(
        self, slots: Sequence[int], guesses_RT: np.ndarray | jax.Array, *, sampler: sampling.Sampler
    ) -> functools.partial:
        R = guesses_RT.shape[0]
        slots_R, mask_RW = self._padded(slots, R), self._masks((), rows=R)
        return functools.partial(
            decode_programs.verify, self._cfg, self._params, self._state, slots_R, guesses_RT,
            mask_RW, sampler=sampler, **self._common,
        )  # fmt: skip

    def propose(self, slots: Sequence[int], *, rows: int, sampler: sampling.Sampler) -> jax.Array:
        """The draft's guesses for these slots in a bucket of `rows`, on the device."""
        return self._draft.propose(self._state.slots, self._padded(slots, rows), sampler=sampler)

    def read_draft(self, work: scheduler.Prefill) -> None:
        """Has the draft alone read these chunks, which have others before them in their pages."""
        self._draft.read(self._chunks(work, ()), prefix="pages")

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """The final hidden state of the last token, of length 1: [D] in float32."""
        bucket = max(_LEAST, 1 << (len(tokens) - 1).bit_length())
        tokens_1T = np.zeros((1, min(bucket, transformer.max_length(self._cfg))), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        lengths_1 = np.asarray([len(tokens)], np.int32)
        hidden_1D = decode_programs.embed(
            self._cfg,
            self._params,
            tokens_1T,
            lengths_1,
            dtype=self._dtype,
            layout=self._layout,
        )
        return np.asarray(hidden_1D[0])

    def _padded(self, slots: Sequence[int], rows: int) -> np.ndarray:
        """[rows] with slots that do not exist after these."""
        slots_R = np.full(rows, self._settings.num_slots, np.int32)
        slots_R[: len(slots)] = slots
        return slots_R

    def _masks(self, masks: Sequence[np.ndarray | None], *, rows: int) -> np.ndarray | jax.Array:
        """Words of allowed tokens [rows, W]; None, and rows beyond: all are allowed."""
        if rows not in self._allowed:
            self._allowed[rows] = jnp.full((rows, self._words), 2**32 - 1, jnp.uint32)
        if all(mask is None for mask in masks):
            return self._allowed[rows]
        mask_RW = np.full((rows, self._words), 2**32 - 1, np.uint32)
        for row, mask in enumerate(masks):
            if mask is not None:
                mask_RW[row] = mask
        return mask_RW

    def _chunks(
        self, work: scheduler.Prefill, masks: Sequence[np.ndarray | None]
    ) -> slot_state.Chunks:
        """Arrays of the chunks; rows beyond them are padding."""
        rows, length = work.num_rows, work.length
        fields = {
            "slots_R": np.full(rows, self._settings.num_slots, np.int32),
            "tokens_RT": np.zeros((rows, length), np.int32),
            "starts_R": np.zeros(rows, np.int32),
            "lengths_R": np.zeros(rows, np.int32),
            "table_RM": np.zeros((rows, self._width), np.int32),
            "last_R": np.zeros(rows, bool),
            "max_tokens_R": np.zeros(rows, np.int32),
            "next_RT": np.zeros((rows, length), np.int32),
            "seen_RW": np.zeros((rows, self._words), np.uint32),
        }
        for row, chunk in enumerate(work.chunks):
            prompt, start, count = chunk.request.tokens, chunk.start, len(chunk.tokens)
            following = prompt[start + 1 : start + count + 1]
            fields["slots_R"][row] = chunk.slot
            fields["tokens_RT"][row, :count] = chunk.tokens
            fields["next_RT"][row, : len(following)] = following
            fields["starts_R"][row], fields["lengths_R"][row] = start, count
            fields["table_RM"][row, : len(chunk.pages)] = chunk.pages
            fields["last_R"][row] = chunk.is_last
            fields["max_tokens_R"][row] = chunk.request.sampling.max_tokens
            if chunk.is_last:
                fields["seen_RW"][row] = self._bits(prompt)
        requests = [chunk.request.sampling for chunk in work.chunks]
        return slot_state.Chunks(
            **fields,
            settings=sampling.settings(requests, num_rows=rows),
            mask_RW=self._masks(masks, rows=rows),
        )

    def _bits(self, tokens: Sequence[int]) -> np.ndarray:
        """Words with the bit of each token set: uint32 [W]."""
        marked = np.zeros(32 * self._words, bool)
        marked[list(tokens)] = True
        return np.packbits(marked, bitorder="little").view(np.uint32)

    def programs(self) -> Iterator[Program]:
        """Every program that an engine of these settings dispatches."""
        shapes = scheduler.shapes(self._settings)
        for rows, length in shapes.prefill:
            padding = scheduler.Prefill(chunks=(), num_rows=rows, length=length)
            chunks = functools.partial(self._chunks, padding, ())
            for prefix in ("none", "pages"):
                for score in ("no", "prompt"):
                    yield Program(
                        f"prompts {rows} x {length}, prefix {prefix}, scores {score}",
                        lambda c=chunks, p=prefix, s=score: self._reading(c(), prefix=p, score=s),
                        lambda c=chunks, p=prefix, s=score: self._prefill(c(), prefix=p, score=s),
                    )
        steps = self._settings.decode_steps
        drawing = {"greedy": ("greedy", steps), "sampled": ("full", steps)}
        if steps > 1:
            drawing["constrained"] = ("full", 1)
        for rows in shapes.decode:
            for name, (sampler, num_steps) in drawing.items():
                call = {"sampler": sampler, "num_steps": num_steps, "rows": rows}
                yield Program(
                    f"{num_steps} tokens of {rows}, {name}",
                    functools.partial(self._advancing, (), (), **call),
                    functools.partial(self.advance, (), (), **call),
                )
        if self._settings.speculation == "off":
            return
        most = min(self._settings.speculation_rows, self._settings.num_slots)
        bucket = next(rows for rows in shapes.decode if rows >= most)
        for rows in (rows for rows in shapes.decode if rows <= bucket):
            guesses_RT = np.full((rows, self._settings.guesses), forward.PAD, np.int32)
            for sampler in ("greedy", "full"):
                yield Program(
                    f"{self._settings.guesses} guesses of {rows}, {sampler}",
                    functools.partial(self._verifying, (), guesses_RT, sampler=sampler),
                    functools.partial(self._dry_round, guesses_RT, sampler),
                )

    def _dry_round(self, guesses_RT: np.ndarray, sampler: sampling.Sampler) -> sampling.Drawn:
        if self._draft is not None:
            guesses_RT = self.propose((), rows=len(guesses_RT), sampler=sampler)
        return self.verify((), guesses_RT, sampler=sampler)
