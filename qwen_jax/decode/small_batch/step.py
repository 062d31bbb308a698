"""When the kernels for few rows run, and a decoding step made of them."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import fused_layers, sampling, slot_state
from qwen_jax.decode.small_batch import layer_kernel, lm_head
from qwen_jax.decode.small_batch.kernel_types import Rows, Tuning
from qwen_jax.model import rope, transformer
from qwen_jax.ops.attention.paged import gpu as paged_gpu
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.quant import array

Implementation = Literal["kernels", "xla"]

MOST_ROWS = 8
FASTER_ROWS = 1  # with 4 rows of 0.5B, XLA takes half the time
MOST_INPUTS = 1024  # hidden size: of larger models it was not measured


def choose(
    cfg: ModelConfig, params: dict, pages: kv_pages.Pages, *, rows: int, layout: Layout | None
) -> Implementation:
    """What decodes so many rows fastest here."""
    if rows > FASTER_ROWS:
        return "xla"
    platform = sharding.platform(layout)
    reason = why_not(cfg, params, pages, rows=rows, layout=layout, platform=platform)
    return "kernels" if reason is None else "xla"


def why_not(
    cfg: ModelConfig,
    params: dict,
    pages: kv_pages.Pages,
    *,
    rows: int,
    layout: Layout | None,
    platform: str,
) -> str | None:
    """Why the kernels cannot run this, or None if they can."""
    if not all(fused_layers.is_output_major(one) for one in params["layers"]):
        return "the parameters are not output-major (`decode_params.prepare` says when they are)"
    if any(map(array.is_quantised, jax.tree.leaves(params, is_leaf=array.is_quantised))):
        return "weights are quantised"
    if rows > MOST_ROWS:
        return f"there are {rows} rows, and they take at most {MOST_ROWS}"
    if any(isinstance(one, kv_pages.Quantised) for one in pages.layers):
        return "pages are int8"
    if (reason := why_not_model(cfg, dtype=pages.dtype, layout=layout, platform=platform)) is None:
        q_RNH = jax.ShapeDtypeStruct((rows, cfg.num_attention_heads, cfg.head_dim), pages.dtype)
        return paged_gpu.unsupported_decode(q_RNH, pages.layers[0])
    return reason


def why_not_model(
    cfg: ModelConfig, *, dtype: jnp.dtype, layout: Layout | None, platform: str
) -> str | None:
    """Why the kernels would never run for this model: then its parameters need not be turned."""
    if platform != "gpu":
        return f"platform {platform!r} is not 'gpu'"
    if layout is not None:
        return "there is a mesh"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"arithmetic is {jnp.dtype(dtype).name}, not bfloat16"
    if cfg.moe is not None or cfg.dual_chunk_attention is not None:
        return "only dense models with plain attention"
    if cfg.hidden_size > MOST_INPUTS:
        return f"hidden_size {cfg.hidden_size} is above {MOST_INPUTS}"
    return None


@functools.lru_cache(maxsize=8)
def multiprocessors() -> int:
    """Those of JAX's default device, which all must run a program of `layer` at once."""
    return jax.devices()[0].core_count


def barriers() -> jax.Array:
    """What a first `run` is given."""
    return jnp.zeros(layer_kernel.NUM_BARRIERS, jnp.int32)


def run(
    cfg: ModelConfig,
    params: dict,
    rows: slot_state.Rows,
    active_R: jax.Array,
    pages: kv_pages.Pages,
    barriers: jax.Array,
    *,
    tuning: Tuning | None = None,
) -> tuple[jax.Array, kv_pages.Pages, jax.Array]:
    """The layers on every row's last token -> the residual stream [R, D], pages and barriers."""
    tuning = tuning or Tuning(programs=multiprocessors())
    rotation = rope.rotation(cfg, rows.lengths_B[:, None])
    shared = Rows(
        cos_Rh=rotation.cos_BTh[:, 0],
        sin_Rh=rotation.sin_BTh[:, 0],
        table_RM=rows.table_BM,
        lengths_R=jnp.where(active_R, rows.lengths_B + 1, 0),
    )
    x_RD = transformer.embed(cfg, params, rows.tokens_B[:, None], dtype=pages.dtype)[:, 0]
    kept = []
    for values, kv_PSCH in zip(params["layers"], pages.layers, strict=True):
        x_RD, kv_PSCH, barriers = _layer(
            cfg, x_RD, layer_kernel.weights(cfg, values), kv_PSCH, shared, barriers, tuning=tuning
        )
        kept.append(kv_PSCH)
    return x_RD, kv_pages.Pages(tuple(kept)), barriers


# One function, so that the kernel is made once for all layers.
_layer = jax.jit(layer_kernel.run, static_argnames=("cfg", "tuning", "interpret"))


def logits(cfg: ModelConfig, params: dict, x_RD: jax.Array) -> jax.Array:
    """The final norm and the output projection, [R, V] in float32."""
    if not cfg.tie_word_embeddings:
        x_R1D = transformer.parts(cfg)["norm"].bind(params["norm"])(x_RD[:, None])
        return transformer.unembed(cfg, params, x_R1D)[:, 0]
    return lm_head.logits(*_head(params, x_RD), **_head_options(cfg))


def likeliest(cfg: ModelConfig, params: dict, x_RD: jax.Array) -> jax.Array:
    """The token of the largest logit of every row, the first of equals, [R] int32."""
    if not cfg.tie_word_embeddings:
        return sampling.argmax(logits(cfg, params, x_RD))
    return lm_head.likeliest(*_head(params, x_RD), **_head_options(cfg))


def _head(params: dict, x_RD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return x_RD, params["norm"]["scale"], params["embed"]["weight"]


def _head_options(cfg: ModelConfig) -> dict:
    return {"eps": cfg.rms_norm_eps, "tuning": lm_head.Tuning(programs=2 * multiprocessors())}
