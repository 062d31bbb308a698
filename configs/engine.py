"""How a batch inference engine shares one model among its requests."""

from typing import Annotated, Literal

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config()
class EngineConfig:
    """How a batch inference engine shares one model among its requests."""

    num_slots: Positive[int] = 256  # requests that decode at one time
    page_size: Positive[int] = 64  # positions of keys and values that are given out together
    num_pages: NonNegative[int] = 0  # 0: as many as the device's memory holds
    kv_cache: Literal["plain", "int8"] = "plain"  # int8: half the bytes of bfloat16, 0.8% off
    # Of a device's memory, for parameters, pages and all else
    memory_fraction: Annotated[float, Range(above=0, below=1)] = 0.9
    # Tokens of prompt and answer together; 0: as many as the model reads
    max_length: NonNegative[int] = 0
    # Most tokens of one prompt that are read at one time
    prefill_chunk: Positive[int] = 2048
    # Most tokens of all prompts that are read at one time
    prefill_tokens: Positive[int] = 8192
    decode_steps: Positive[int] = 8  # tokens a request draws before the host looks
    # prefill_tokens that those who decode may wait for, so many times
    prefill_rounds: Positive[int] = 1
    # Guesses of tokens, checked in one pass: copied from the text so far, or a smaller model's.
    speculation: Literal["off", "prompt_lookup", "draft"] = "off"
    guesses: Positive[int] = 4  # tokens guessed at one time
    # Most requests that decode at one time for which guessing may pay
    speculation_rows: Positive[int] = 8
    prefix_cache: Literal["on", "off"] = "on"  # prompts that begin alike are read once
    policy: Literal["fair", "longest_first"] = "fair"
    # Shapes of the device's programs: a few of each, or one, so that neighbours never change it.
    buckets: Literal["few", "one"] = "few"

    def __post_init__(self) -> None:
        schema.check(
            self.prefill_chunk % self.page_size == 0,
            f"prefill_chunk={self.prefill_chunk} must be a multiple of page_size={self.page_size}",
        )
        schema.check(
            self.prefill_tokens >= self.prefill_chunk,
            f"prefill_tokens={self.prefill_tokens} must be at least "
            f"prefill_chunk={self.prefill_chunk}",
        )
