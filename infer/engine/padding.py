"""Arguments of dispatches as host arrays, padded to the shapes of an engine's programs."""

from collections.abc import Sequence

import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from infer.engine import scheduler
from infer.speculation.proposers import DraftChunk
from qwen_jax.decode import sampling, slot_state


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
