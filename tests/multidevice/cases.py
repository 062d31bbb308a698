"""The model, batch and training loss that are laid out on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from partitioning import mesh, rules, sharding
from qwen_jax.model import transformer
from qwen_jax.ops.attention import context_parallelism
from tests.multidevice import hlo
from train.losses import language_model

# Every size differs, so that a shape in the compiled program says what it is. The length times the
# vocabulary outweighs every parameter.
MODEL = dataclasses.replace(
    qwen2_5.tiny_untied(),
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=24,
)
FEW_KV_HEADS = dataclasses.replace(MODEL, num_key_value_heads=2)
TIED = dataclasses.replace(MODEL, tie_word_embeddings=True)
B, T, CHUNK = 16, 80, 16


def batch() -> tuple[np.ndarray, ...]:
    """tokens, targets, weights, segment ids and positions [B, T] of packed rows."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, MODEL.vocab_size, (2, B, T), np.int32)
    weights = random.integers(0, 2, (B, T)).astype(np.float32)
    cuts = random.integers(1, T, (B, 1))
    columns = np.arange(T, dtype=np.int32)[None]
    segments = (columns >= cuts).astype(np.int32) + 1
    positions = np.where(columns >= cuts, columns - cuts, columns).astype(np.int32)
    return tokens, targets, weights, segments, positions


def layout(text: str) -> sharding.Layout:
    """The layout of `mesh` text on the eight devices, for training."""
    config = mesh.parse(text)
    return sharding.Layout(mesh.make(config), rules.rule_set("train", kv_heads=config.kv_heads))


def loss(params, tokens, targets, weights, segments, positions, *, cfg, dtype, layout, options):
    arrange = functools.partial(
        context_parallelism.arrange, variant=options.get("context_parallel"), layout=layout
    )
    with jax.named_scope("arrange"):
        rows = map(arrange, (tokens, targets, weights, segments, positions))
        tokens, targets, weights, segments, positions = rows
    with jax.named_scope("model"):
        hidden_BTD = transformer.apply(
            cfg,
            params,
            tokens,
            segment_ids_BT=segments,
            positions_BT=positions,
            dtype=dtype,
            layout=layout,
            **options,
        ).hidden_BTD
    with jax.named_scope("loss"):
        sums = language_model.cross_entropy(
            hidden_BTD,
            transformer.output_kernel(cfg, params),
            targets,
            weights,
            z_loss=1e-3,
            chunk=CHUNK,
            layout=layout,
        )
        return sums.loss / sums.weight


@functools.cache
def random_params(cfg: ModelConfig) -> dict:
    """Parameters of which none is zero, biases included."""
    shapes = transformer.shapes(cfg)
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(1)
    return jax.tree.unflatten(
        tree, [(0.2 * random.normal(size=s.shape)).astype(np.float32) for s in leaves]
    )


@functools.cache
def one_device(cfg: ModelConfig):
    """(loss, gradients) without any layout."""
    run = functools.partial(loss, cfg=cfg, dtype=jnp.float32, layout=None, options={})
    return jax.jit(jax.value_and_grad(run))(random_params(cfg), *batch())


@functools.cache
def program(
    text: str,
    *,
    cfg: ModelConfig = MODEL,
    dtype: str = "float32",
    layer_loop: str = "scan",
    remat: str = "full",
    context_parallel: str | None = None,
) -> hlo.Program:
    """Loss and gradients compiled for a mesh, by default with every layer recomputed."""
    placed = layout(text)
    sharding.check_model(cfg, placed)
    of_params = sharding.shardings(transformer.axes(cfg), placed)
    of_batch = sharding.sharding(("batch", "length"), placed)
    options = {
        "remat_policy": remat,
        "layer_loop": layer_loop,
        "context_parallel": context_parallel,
    }
    run = functools.partial(loss, cfg=cfg, dtype=jnp.dtype(dtype), layout=placed, options=options)
    step = jax.jit(
        jax.value_and_grad(run),
        in_shardings=(of_params, *[of_batch] * 5),
        out_shardings=(None, of_params),
    )
    return hlo.compile_and_read(step.lower(transformer.shapes(cfg), *batch()), placed.mesh)
