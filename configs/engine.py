"""Settings of a batch inference engine, which shares one model among its requests."""

from typing import Annotated, Literal

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config()
class EngineConfig:
    """Settings of a batch inference engine, which shares one model among its requests."""

    num_slots: Positive[int] = 256  # requests that decode at one time
    page_size: Positive[int] = 64  # Tokens whose keys and values one cache page holds
    num_pages: NonNegative[int] = 0  # Cache pages; 0: as many as fit into memory
    kv_cache: Literal["plain", "int8"] = "plain"  # int8: half of bfloat16's bytes, 0.8% error
    # Fraction of a device's memory for parameters, cache pages and temporary arrays
    memory_fraction: Annotated[float, Range(above=0, below=1)] = 0.9
    # Most tokens of prompt and answer together; 0: the model's longest position
    max_length: NonNegative[int] = 0
    # Most tokens of one prompt in one prefill step
    prefill_chunk: Positive[int] = 2048
    # Most tokens of all prompts in one prefill step
    prefill_tokens: Positive[int] = 8192
    decode_steps: Positive[int] = 8  # Tokens per request between two host steps
    # Prefill steps, of prefill_tokens each, for which decoding requests may wait
    prefill_rounds: Positive[int] = 1
    # Source of draft tokens, verified in one pass: earlier text of the request, or a draft model.
    speculation: Literal["off", "prompt_lookup", "draft"] = "off"
    guesses: Positive[int] = 4  # Draft tokens per verification
    # Most decoding requests with which speculation is used
    speculation_rows: Positive[int] = 8
    prefix_cache: Literal["on", "off"] = "on"  # on: a shared prefix is prefilled once
    policy: Literal["fair", "longest_first"] = "fair"
    # Shapes of the device's programs. one: every program has one shape; with speculation=off an
    # answer is then bitwise that of its request alone. few: smaller shapes while few requests run;
    # other requests then change an answer by rounding.
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
