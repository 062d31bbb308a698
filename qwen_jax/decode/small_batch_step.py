"""The choice of the kernels in `small_batch/`, and a decoding step made of them."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import sampling, slot_state
from qwen_jax.decode.small_batch import layer_kernel, lm_head, support
from qwen_jax.decode.small_batch.kernel_types import Rows, Tuning
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import rope, transformer
from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages

Implementation = Literal["kernels", "xla"]

MOST_ROWS = 8
FASTER_ROWS = 1  # with 4 rows of the 0.5B, XLA takes half the time


def choose(
    cfg: ModelConfig,
    weights: DecodeWeights,
    pages: kv_pages.Pages,
    *,
    rows: int,
    layout: Layout | None,
) -> Implementation:
    """The implementation that decodes so many rows fastest here."""
    if rows > FASTER_ROWS:
        return "xla"
    platform = sharding.platform(layout)
    reason = unsupported(cfg, weights, pages, rows=rows, layout=layout, platform=platform)
    return "kernels" if reason is None else "xla"


def unsupported(
    cfg: ModelConfig,
    weights: DecodeWeights,
    pages: kv_pages.Pages,
    *,
    rows: int,
    layout: Layout | None,
    platform: str,
) -> str | None:
    """The reason why the kernels cannot run these rows; None where they can."""
    if weights.form != "output_major":
        return f"the weights are {weights.form}, not output_major (`weights.best_form`)"
    if rows > MOST_ROWS:
        return f"there are {rows} rows, and they take at most {MOST_ROWS}"
    if any(isinstance(one, kv_pages.Quantised) for one in pages.layers):
        return "pages are int8"
    reason = support.unsupported(cfg, dtype=pages.dtype, layout=layout, platform=platform)
    if reason is not None:
        return reason
    q_RNH = jax.ShapeDtypeStruct((rows, cfg.num_attention_heads, cfg.head_dim), pages.dtype)
    return paged_gpu.unsupported_decode(q_RNH, pages.layers[0])


@functools.lru_cache(maxsize=8)
def multiprocessors() -> int:
    """Multiprocessors of JAX's default device: the most programs of the layer kernel."""
    return jax.devices()[0].core_count


def barriers() -> jax.Array:
    """The barriers for the first `run`."""
    return jnp.zeros(layer_kernel.NUM_BARRIERS, jnp.int32)


def run(
    cfg: ModelConfig,
    weights: DecodeWeights,
    rows: slot_state.Rows,
    active_R: jax.Array,
    pages: kv_pages.Pages,
    barriers: jax.Array,
    *,
    tuning: Tuning | None = None,
) -> tuple[jax.Array, kv_pages.Pages, jax.Array]:
    """The residual stream [R, D] after all layers read every row's last token; pages; barriers."""
    tuning = tuning or Tuning(programs=multiprocessors())
    rotation = rope.rotation(cfg, rows.lengths_B[:, None])
    shared = Rows(
        cos_Rh=rotation.cos_BTh[:, 0],
        sin_Rh=rotation.sin_BTh[:, 0],
        table_RM=rows.table_BM,
        lengths_R=jnp.where(active_R, rows.lengths_B + 1, 0),
    )
    x_RD = transformer.embed(cfg, weights.params, rows.tokens_B[:, None], dtype=pages.dtype)[:, 0]
    new_pages = []
    for values, kv_PSCH in zip(weights.layers, pages.layers, strict=True):
        x_RD, kv_PSCH, barriers = _layer(
            cfg, x_RD, layer_kernel.weights(cfg, values), kv_PSCH, shared, barriers, tuning=tuning
        )
        new_pages.append(kv_PSCH)
    return x_RD, kv_pages.Pages(tuple(new_pages)), barriers


# One jitted function, so that the kernel is lowered once for all layers.
_layer = jax.jit(layer_kernel.run, static_argnames=("cfg", "tuning", "interpret"))


def logits(cfg: ModelConfig, weights: DecodeWeights, x_RD: jax.Array) -> jax.Array:
    """Logits [R, V] in float32, from the residual stream."""
    if not cfg.tie_word_embeddings:
        x_R1D = transformer.definitions(cfg)["norm"].bind(weights.params["norm"])(x_RD[:, None])
        return transformer.unembed(cfg, weights.params, x_R1D)[:, 0]
    return lm_head.logits(*_head(weights, x_RD), **_head_options(cfg))


def likeliest(cfg: ModelConfig, weights: DecodeWeights, x_RD: jax.Array) -> jax.Array:
    """The token of every row's largest logit, the first of equal ones, [R] int32."""
    if not cfg.tie_word_embeddings:
        return sampling.argmax(logits(cfg, weights, x_RD))
    return lm_head.likeliest(*_head(weights, x_RD), **_head_options(cfg))


def _head(weights: DecodeWeights, x_RD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    params = weights.params
    return x_RD, params["norm"]["scale"], params["embed"]["weight"]


def _head_options(cfg: ModelConfig) -> dict:
    return {"eps": cfg.rms_norm_eps, "tuning": lm_head.Tuning(programs=2 * multiprocessors())}
