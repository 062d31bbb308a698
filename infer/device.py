"""The device's side of an engine: its programs with their state, and padding to their shapes."""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from configs import schema
from infer import scheduler
from partitioning.sharding import Layout
from qwen_jax import generation, paged_decode, paged_pass, paged_state, sampling


class Device:
    """Parameters and state of one engine, with the programs of `qwen_jax/paged_decode.py`."""

    def __init__(
        self,
        cfg: schema.Model,
        params: dict,
        *,
        settings: schema.Engine,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: paged_pass.Attention | None,
        layout: Layout | None,
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
        self._state = paged_state.empty(
            cfg,
            num_slots=settings.num_slots,
            width=self._width,
            num_pages=settings.num_pages,
            page_size=settings.page_size,
            dtype=dtype,
            storage=settings.kv_cache,
            layout=layout,
        )

    def prefill(self, chunks: paged_state.Chunks, **how) -> tuple:
        """`paged_decode.prefill` on the state -> what was drawn, and scores or None."""
        self._state, drawn, scored = paged_decode.prefill(
            self._cfg, self._params, self._state, chunks, **how, **self._common
        )
        return drawn, scored

    def advance(
        self, slots: Sequence[int], masks: Sequence[np.ndarray | None], *, rows: int, **how
    ) -> sampling.Drawn:
        """`paged_decode.advance` on the state, for these slots in a bucket of `rows`."""
        slots_R = np.full(rows, self._settings.num_slots, np.int32)
        slots_R[: len(slots)] = slots
        mask_RW = self.masks(masks, rows=rows)
        self._state, drawn = paged_decode.advance(
            self._cfg, self._params, self._state, slots_R, mask_RW, **how, **self._common
        )
        return drawn

    def verify(
        self, slots: Sequence[int], guesses: Sequence[Sequence[int]], *, rows: int, **how
    ) -> sampling.Drawn:
        """`paged_decode.verify` on the state, for these slots in a bucket of `rows`."""
        slots_R = np.full(rows, self._settings.num_slots, np.int32)
        slots_R[: len(slots)] = slots
        guesses_RT = np.full((rows, self._settings.guesses), -1, np.int32)
        for row, some in enumerate(guesses):
            guesses_RT[row, : len(some)] = some
        mask_RW = self.masks((), rows=rows)
        self._state, drawn = paged_decode.verify(
            self._cfg,
            self._params,
            self._state,
            slots_R,
            guesses_RT,
            mask_RW,
            **how,
            **self._common,
        )
        return drawn

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """The final hidden state of the last token, of length 1: [D] in float32."""
        tokens_1T = np.zeros((1, generation.prompt_bucket(self._cfg, len(tokens))), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        lengths_1 = np.asarray([len(tokens)], np.int32)
        hidden_1D = paged_decode.embed(
            self._cfg,
            self._params,
            tokens_1T,
            lengths_1,
            dtype=self._dtype,
            layout=self._layout,
        )
        return np.asarray(hidden_1D[0])

    def masks(self, masks: Sequence[np.ndarray | None], *, rows: int) -> np.ndarray | jax.Array:
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

    def blank(self, *, rows: int, length: int) -> dict[str, np.ndarray]:
        """Fields of `paged_state.Chunks` for rows of padding, but `settings` and `mask_RW`."""
        return {
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

    def bits(self, tokens: Sequence[int]) -> np.ndarray:
        """Words with the bit of each token set: uint32 [W]."""
        marked = np.zeros(32 * self._words, bool)
        marked[list(tokens)] = True
        return np.packbits(marked, bitorder="little").view(np.uint32)

    def programs(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Every program that an engine of these settings dispatches, by name, to run on padding."""
        shapes = scheduler.shapes(self._settings)
        for rows, length in shapes.prefill:
            for past in ("none", "pages"):
                for score in ("no", "prompt"):
                    text = f"prompts {rows} x {length}, past {past}, scores {score}"
                    how = {"how": "full", "past": past, "score": score}
                    yield text, lambda shape=(rows, length), how=how: self._dry(*shape, **how)
        steps = self._settings.decode_steps
        drawing = {"greedy": ("greedy", steps), "sampled": ("full", steps)}
        if steps > 1:
            drawing["constrained"] = ("full", 1)
        for rows in shapes.decode:
            for name, (how, num_steps) in drawing.items():
                call = {"how": how, "num_steps": num_steps, "rows": rows}
                text = f"{num_steps} tokens of {rows}, {name}"
                yield text, lambda call=call: self._wait(self.advance((), (), **call))
        if self._settings.speculation == "off":
            return
        most = min(self._settings.speculation_rows, self._settings.num_slots)
        bucket = next(rows for rows in shapes.decode if rows >= most)
        for rows in (rows for rows in shapes.decode if rows <= bucket):
            for how in ("greedy", "full"):
                call = {"how": how, "rows": rows}
                text = f"{self._settings.guesses} guesses of {rows}, {how}"
                yield text, lambda call=call: self._wait(self.verify((), (), **call))

    def _dry(self, rows: int, length: int, **how) -> None:
        chunks = paged_state.Chunks(
            **self.blank(rows=rows, length=length),
            settings=sampling.settings([], num_rows=rows),
            mask_RW=self.masks((), rows=rows),
        )
        self._wait(self.prefill(chunks, **how))

    def _wait(self, results) -> None:
        jax.block_until_ready(results)
