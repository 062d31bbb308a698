"""What a model and a device can take: prompts that can be served, and pages that fit."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from configs.sampling import SamplingParams
from partitioning.sharding import Layout
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import kv_pages

_HOST_BYTES = 2 * 2**30  # for pages, where the device does not tell its size


def check_prompt(
    cfg: ModelConfig, tokens: Sequence[int], *, settings: SamplingParams
) -> tuple[int, ...]:
    """The prompt's tokens; an empty one begins with the model's bos token.

    Raises `ValueError` for a token outside the vocabulary, for an empty prompt where the model has
    no bos token, and where prompt and answer would exceed the model's length.
    """
    tokens = tuple(int(token) for token in tokens)
    if not tokens:
        if cfg.bos_token_id is None:
            raise ValueError(
                f"the prompt is empty and {cfg.name} has no bos_token_id to begin with; give at "
                f"least one token"
            )
        tokens = (cfg.bos_token_id,)
    for name, ids in (
        ("prompt", tokens),
        ("logit_bias", [token for token, _ in settings.logit_bias]),
        ("stop_token_ids", settings.stop_token_ids),
    ):
        for token in ids:
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(
                    f"{name} token {token} is outside the vocabulary of {cfg.vocab_size} rows; use "
                    f"the tokenizer that came with the model"
                )
    try:
        transformer.check_length(cfg, len(tokens) + settings.max_tokens)
    except ValueError as error:
        raise ValueError(
            f"prompt of {len(tokens)} tokens with max_tokens={settings.max_tokens}: {error}"
        ) from None
    return tokens


def check_mesh(layout: Layout) -> None:
    """Raises `ValueError` where devices would do the same work, or rows would be spread."""
    idle = [axis for axis in ("data", "fsdp", "context") if layout.mesh.shape.get(axis, 1) > 1]
    if idle or layout.size("batch") > 1:
        raise ValueError(
            f"an engine shares out its model over tensor and expert, and this mesh has "
            f"{dict(layout.mesh.shape)} under rules {layout.rules.name!r}; give fsdp=1 and no "
            f"other axis, rules 'engine', and one engine to each replica"
        )


def num_pages(
    models: Sequence[tuple[ModelConfig, DecodeWeights, Layout | None]],
    *,
    settings: EngineConfig,
    dtype: jnp.dtype,
) -> int:
    """Number of pages that `memory_fraction` of a device holds, and that all slots could ever use.

    `models` are the model with its parameters and layout, and the draft model if there is one: each
    has its own pages, equally many. Raises `ValueError` where not even one request of max_length
    fits; without a max_length one page is enough.
    """
    length = settings.max_length or transformer.max_length(models[0][0])
    width = -(-length // settings.page_size)
    page = sum(
        kv_pages.num_bytes(
            cfg,
            num_pages=1,
            page_size=settings.page_size,
            dtype=dtype,
            storage=settings.kv_cache,
            layout=layout,
        )
        for cfg, _, layout in models
    )
    layout = models[0][2]
    device = jax.local_devices()[0] if layout is None else layout.mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        held = sum(_bytes_on(x, device) for _, params, _ in models for x in jax.tree.leaves(params))
        limit = int(settings.memory_fraction * stats["bytes_limit"])
        # The models run one after the other.
        working = max(working_bytes(cfg, settings=settings, dtype=dtype) for cfg, _, _ in models)
        left = limit - held - working
    else:
        limit, left = _HOST_BYTES, _HOST_BYTES
    count = min(left // page, settings.num_slots * width)
    if count < (width if settings.max_length else 1):
        raise ValueError(
            f"{max(left, 0) / 2**30:.2f} GiB of {limit / 2**30:.2f} are left for keys and values; "
            f"a request of max_length={length} needs {width * page / 2**30:.2f}: lower max_length, "
            f"num_slots or prefill_tokens, or spread the model over more devices"
        )
    return count


def working_bytes(cfg: ModelConfig, *, settings: EngineConfig, dtype: jnp.dtype) -> int:
    """Bytes that a dispatch needs beside parameters and pages, estimated from above.

    One layer's activations of `prefill_tokens` tokens; four arrays of float32 scores a slot
    (logits, sorted and noisy copies, masks), and what the slots keep: counts and marks of tokens.
    """
    size = jnp.dtype(dtype).itemsize
    widest = max(cfg.intermediate_size, cfg.moe.moe_intermediate_size if cfg.moe else 0)
    activations = settings.prefill_tokens * size * (8 * cfg.hidden_size + 3 * widest)
    return activations + settings.num_slots * cfg.vocab_size * (4 * 4 + 4 + 1)


def _bytes_on(x: jax.Array, device: jax.Device) -> int:
    return sum(shard.data.nbytes for shard in x.addressable_shards if shard.device == device)
