"""One transformer layer for a few rows as one kernel on a GPU, lowered by Triton.

A layer of a small model at batch 1 reads some 30 MB, 10 microseconds' worth, in five products that
wait for each other. As kernels of their own each of them begins and ends with idle memory. Here one
program a multiprocessor goes through five phases with a barrier between two; while it waits, the
weights that it needs next are on their way to its registers already.

    qkv = norm(x) W_qkv + b;  o = attention(rotated q, keys and values, among them the new ones);
    x += o W_o;  h = silu(norm(x) W_gate) * norm(x) W_up;  x += h W_down

Kernels are output-major (`qwen_jax/output_major.py`), so that a program makes whole outputs. Sums
are float32, and rounded to the rows' dtype where `model.Block` rounds.

The barrier needs all programs running at once: there are no more of them than multiprocessors. The
interpreter runs one after the other; there the phases are launched apart.

Letters: R rows, W = K (G + 2) H, X splits of a row's positions; see also `products.py`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from configs.models.architecture import ModelConfig
from qwen_jax.decode.small_batch import attention_phases, matmul_phases
from qwen_jax.decode.small_batch.kernel_types import Between, Rows, Sizes, Tuning, Weights

MOST_SPLITS = 32
NUM_BARRIERS = 4  # between five phases


def weights(cfg: ModelConfig, layer: dict) -> Weights:
    """Of a layer's parameters in the form of `qwen_jax/output_major.py`."""
    attention, mlp, D = layer["attention"], layer["mlp"], cfg.hidden_size
    return Weights(
        norm_D=layer["input_norm"]["scale"],
        qkv_WD=attention["qkv"]["rows"].reshape(-1, D),
        bias_W=attention["qkv"]["bias"].reshape(-1),
        o_DC=attention["o"]["rows"].reshape(D, -1),
        post_norm_D=layer["post_attention_norm"]["scale"],
        gate_up_2FD=mlp["gate_up"]["rows"],
        down_DF=mlp["down"]["rows"],
    )


def run(
    cfg: ModelConfig,
    x_RD: jax.Array,
    weights: Weights,
    kv_PSCH: jax.Array,
    rows: Rows,
    barriers: jax.Array,
    *,
    tuning: Tuning,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The residual stream after the layer, the pages with what is new, and the barriers.

    A row of length 0 is not active: it writes no page, and what becomes of its x is not specified.
    barriers: NUM_BARRIERS zeros (int32) at first, then what the last call gave.
    """
    tuning, rows = _whole_blocks(kv_PSCH, rows, tuning=tuning)
    shapes, sizes = _shapes(cfg, x_RD, kv_PSCH, rows, tuning=tuning)
    if tuning.launch == "phase":
        x_RD, kv_PSCH = _phase_by_phase(
            x_RD, weights, kv_PSCH, rows, shapes, sizes=sizes, tuning=tuning, interpret=interpret
        )
        return x_RD, kv_PSCH, barriers
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (x_RD, kv_PSCH, barriers)]
    y_RD, kv_PSCH, barriers, _ = pl.pallas_call(
        functools.partial(_layer, sizes=sizes, tuning=tuning),
        grid=(tuning.programs,),
        out_shape=(*results, shapes),
        input_output_aliases={0: 1, 1: 2},
        name="layer_of_few_rows",
        **_options(interpret, tuning),
    )(kv_PSCH, barriers, x_RD, weights, rows)
    return y_RD, kv_PSCH, barriers


def _phase_by_phase(
    x_RD, weights: Weights, kv_PSCH, rows: Rows, shapes: Between, *, sizes, tuning, interpret
) -> tuple[jax.Array, jax.Array]:
    def launch(phase: Callable, out_shape, *args, aliases=()):
        return pl.pallas_call(
            lambda *refs: _alone(phase(*refs, sizes=sizes, tuning=tuning)),
            grid=(tuning.programs,),
            out_shape=out_shape,
            input_output_aliases=dict(aliases),
            name=phase.__name__.strip("_"),
            **_options(interpret, tuning),
        )(*args)

    qkv_RW = launch(matmul_phases.qkv, shapes.qkv_RW, x_RD, weights)
    pages = jax.ShapeDtypeStruct(kv_PSCH.shape, kv_PSCH.dtype)
    o_RXNH, lse_RXN, kv_PSCH = launch(
        attention_phases.attend,
        (shapes.o_RXNH, shapes.lse_RXN, pages),
        kv_PSCH,
        qkv_RW,
        rows,
        aliases={0: 2},
    )
    x_RD = launch(matmul_phases.o, shapes.x_RD, o_RXNH, lse_RXN, rows, x_RD, weights)
    h_RF = launch(matmul_phases.gate_up, shapes.h_RF, x_RD, weights)
    return launch(matmul_phases.down, shapes.x_RD, h_RF, x_RD, weights), kv_PSCH


def _whole_blocks(kv_PSCH, rows: Rows, *, tuning: Tuning) -> tuple[Tuning, Rows]:
    """Blocks of keys no longer than a row, and a table that ends with one: they are read whole."""
    S, M = kv_PSCH.shape[1], rows.table_RM.shape[1]
    block = min(tuning.attention.block, M * S)
    table_RM = jnp.pad(rows.table_RM, ((0, 0), (0, -M % max(1, block // S))))
    attention = dataclasses.replace(tuning.attention, block=block)
    return (
        dataclasses.replace(tuning, attention=attention),
        dataclasses.replace(rows, table_RM=table_RM),
    )


def _shapes(cfg, x_RD, kv_PSCH, rows: Rows, *, tuning: Tuning) -> tuple[Between, Sizes]:
    (R, D), N, H = x_RD.shape, cfg.num_attention_heads, cfg.head_dim
    K, positions = cfg.num_key_value_heads, rows.table_RM.shape[1] * kv_PSCH.shape[1]
    useful = pl.cdiv(positions, max(tuning.attention.min_keys, tuning.attention.block))
    X = max(1, min(tuning.programs // (R * K), useful, MOST_SPLITS))

    def shape(*sizes: int, dtype=x_RD.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    between = Between(
        qkv_RW=shape(R, (N + 2 * K) * H),
        o_RXNH=shape(R, X, N, H, dtype=jnp.float32),
        lse_RXN=shape(R, X, N, dtype=jnp.float32),
        x_RD=shape(R, D),
        h_RF=shape(R, cfg.intermediate_size),
    )
    return between, Sizes(group=N // K, head_dim=H, eps=cfg.rms_norm_eps, splits=X)


def _options(interpret: bool, tuning: Tuning) -> dict:
    params = triton.CompilerParams(num_warps=tuning.warps, num_stages=1)
    return {"interpret": interpret, "compiler_params": params}


def _layer(
    old_kv, old_barriers, x_RD, weights, rows, y_RD, kv_PSCH, barriers, between, *, sizes, tuning
):
    """All phases. Each reads its first weights, then waits for what the one before wrote."""
    del old_kv, old_barriers  # the same memory as kv_PSCH and barriers
    options = {"sizes": sizes, "tuning": tuning}
    qkv_RW, o_RXNH, lse_RXN = between.qkv_RW, between.o_RXNH, between.lse_RXN
    steps = (
        matmul_phases.qkv(x_RD, weights, qkv_RW, **options),
        attention_phases.attend(None, qkv_RW, rows, o_RXNH, lse_RXN, kv_PSCH, **options),
        matmul_phases.o(o_RXNH, lse_RXN, rows, x_RD, weights, between.x_RD, **options),
        matmul_phases.gate_up(between.x_RD, weights, between.h_RF, **options),
        matmul_phases.down(between.h_RF, between.x_RD, weights, y_RD, **options),
    )
    for index, (ahead, work) in enumerate(steps):
        # A barrier is free again once nobody can be waiting at it: when all have passed the next,
        # or for the last one when the next kernel has begun.
        if index == 0:
            held = ahead()
            _reset(barriers, NUM_BARRIERS - 1)
        else:
            _arrive(barriers, index - 1)
            held = ahead()
            _wait(barriers, index - 1, tuning=tuning)
        if index > 1:
            _reset(barriers, index - 2)
        work(held)


def _alone(phase: tuple[Callable, Callable]) -> None:
    ahead, work = phase
    work(ahead())


def _arrive(barriers, index: int) -> None:
    """Tells all programs that what this one wrote before is there."""
    triton.debug_barrier()  # all of this program's threads have written
    triton.atomic_add(barriers, (index,), 1)


def _wait(barriers, index: int, *, tuning: Tuning) -> None:
    """Until every program has arrived. One thread looks, so that few stand in the way of arrivals.

    It looks without a fence, which would wait for the weights that are on their way. None is
    needed: what is read after a barrier lies where nobody read before it in this kernel, and so
    cannot be old in a multiprocessor's own cache.
    """
    thread = jnp.arange(32 * tuning.warps)
    at = barriers.at[jnp.full(thread.shape, index)]

    def look(_) -> jax.Array:
        return jnp.min(triton.load(at, mask=thread == 0, other=tuning.programs, volatile=True))

    arrived = jax.lax.while_loop(lambda arrived: arrived < tuning.programs, look, look(None))

    @pl.when(arrived < 0)
    def _():
        barriers[index] = 0  # never: but a loop whose result nobody takes would be left out

    triton.debug_barrier()


def _reset(barriers, index: int) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _():
        barriers[index] = 0
