"""How a batch inference engine shares one model among its requests."""

from dataclasses import dataclass
from typing import Literal

from configs import schema


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a batch inference engine shares one model among its requests."""

    num_slots: int = 256  # requests that decode at one time
    page_size: int = 64  # positions of keys and values that are given out together
    num_pages: int = 0  # 0: as many as the device's memory holds
    kv_cache: Literal["plain", "int8"] = "plain"  # int8: half the bytes of bfloat16, 0.8% off
    memory_fraction: float = 0.9  # of a device's memory, for parameters, pages and all else
    max_length: int = 0  # tokens of prompt and answer together; 0: as many as the model reads
    prefill_chunk: int = 2048  # most tokens of one prompt that are read at one time
    prefill_tokens: int = 8192  # most tokens of all prompts that are read at one time
    decode_steps: int = 8  # tokens a request draws before the host looks
    prefill_rounds: int = 1  # prefill_tokens that those who decode may wait for, so many times
    # Guesses of tokens, checked in one pass: copied from the text so far, or a smaller model's.
    speculation: Literal["off", "prompt_lookup", "draft"] = "off"
    guesses: int = 4  # tokens guessed at one time
    speculation_rows: int = 8  # most requests that decode at one time for which guessing may pay
    prefix_cache: Literal["on", "off"] = "on"  # prompts that begin alike are read once
    policy: Literal["fair", "longest_first"] = "fair"
    # Shapes of the device's programs: a few of each, or one, so that neighbours never change it.
    buckets: Literal["few", "one"] = "few"

    def __post_init__(self) -> None:
        schema.check_positive(
            self, "num_slots", "page_size", "prefill_chunk", "prefill_tokens", "decode_steps",
            "prefill_rounds", "guesses", "speculation_rows",
        )  # fmt: skip
        for name in ("num_pages", "max_length"):
            value = getattr(self, name)
            schema.check(value >= 0, f"{name}={value} must be 0 or greater")
        schema.check(
            0 < self.memory_fraction < 1,
            f"memory_fraction={self.memory_fraction} must be in (0, 1)",
        )
        schema.check(
            self.prefill_chunk % self.page_size == 0,
            f"prefill_chunk={self.prefill_chunk} must be a multiple of page_size={self.page_size}",
        )
        schema.check(
            self.prefill_tokens >= self.prefill_chunk,
            f"prefill_tokens={self.prefill_tokens} must be at least "
            f"prefill_chunk={self.prefill_chunk}",
        )
        schema.check(
            self.kv_cache in ("plain", "int8"),
            f"kv_cache={self.kv_cache!r} is unknown; known: plain, int8",
        )
        schema.check(
            self.speculation in ("off", "prompt_lookup", "draft"),
            f"speculation={self.speculation!r} is unknown; known: off, prompt_lookup, draft",
        )
        schema.check(
            self.prefix_cache in ("on", "off"), f"prefix_cache={self.prefix_cache!r}: on or off"
        )
        schema.check(
            self.policy in ("fair", "longest_first"),
            f"policy={self.policy!r} is unknown; known: fair, longest_first",
        )
        schema.check(
            self.buckets in ("few", "one"), f"buckets={self.buckets!r} is unknown; known: few, one"
        )
