"""One transformer layer for a few rows as one kernel on a GPU, lowered by Triton.

A layer of a small model at batch 1 reads some 30 MB, which takes 10 microseconds, in five products
that depend on each other. As five kernels, each begins and ends with idle memory. Here one program
for each multiprocessor runs five phases with a barrier between two; while it waits, the weights
that it needs next are already being loaded into its registers.

    qkv = norm(x) W_qkv + b;  o = attention(rotated q, keys and values, among them the new ones);
    x += o W_o;  h = silu(norm(x) W_gate) * norm(x) W_up;  x += h W_down

Weights are output-major (`qwen_jax/decode/fused_layers.py`), so that a program makes whole outputs.
Sums are float32, and rounded to the rows' dtype where `model.Block` rounds.

The barrier needs all programs running at once: there are no more of them than multiprocessors. The
interpreter runs one after the other; there the phases are launched apart.

Letters: R rows, W = K (G + 2) H, X splits of a row's positions; see also `row_products.py`.
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
from qwen_jax.decode.small_batch.kernel_types import Intermediates, Rows, Sizes, Tuning, Weights

MOST_SPLITS = 32
NUM_BARRIERS = 4  # between five phases


def weights(cfg: ModelConfig, layer: dict) -> Weights:
    """The kernel's view of a layer in the form "output_major" (`qwen_jax/decode/weights.py`)."""
    attention, mlp, D = layer["attention"], layer["mlp"], cfg.hidden_size
    return Weights(
        norm_D=layer["input_norm"]["scale"],
        qkv_WD=attention["qkv"]["kernel"].reshape(-1, D),
        bias_W=attention["qkv"]["bias"].reshape(-1),
        o_DC=attention["o"]["kernel"].reshape(D, -1),
        post_norm_D=layer["post_attention_norm"]["scale"],
        gate_up_2FD=mlp["gate_up"]["kernel"],
        down_DF=mlp["down"]["kernel"],
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
    """The residual stream after the layer, the pages with new keys and values, and the barriers.

    A row of length 0 is not active: it writes no page, and its output is unspecified.
    barriers: NUM_BARRIERS zeros (int32) for the first call, then the previous call's result.
    """
    tuning, rows = _limit_blocks(kv_PSCH, rows, tuning=tuning)
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
        name="small_batch_layer",
        **_options(interpret, tuning),
    )(kv_PSCH, barriers, x_RD, weights, rows)
    return y_RD, kv_PSCH, barriers


def _phase_by_phase(
    x_RD, weights: Weights, kv_PSCH, rows: Rows, shapes: Intermediates, *, sizes, tuning, interpret
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


def _limit_blocks(kv_PSCH, rows: Rows, *, tuning: Tuning) -> tuple[Tuning, Rows]:
    """Tuning whose blocks of keys are no longer than a row, and a page table of whole blocks."""
    S, M = kv_PSCH.shape[1], rows.table_RM.shape[1]
    block = min(tuning.attention.block, M * S)
    table_RM = jnp.pad(rows.table_RM, ((0, 0), (0, -M % max(1, block // S))))
    attention = dataclasses.replace(tuning.attention, block=block)
    return (
        dataclasses.replace(tuning, attention=attention),
        dataclasses.replace(rows, table_RM=table_RM),
    )


def _shapes(cfg, x_RD, kv_PSCH, rows: Rows, *, tuning: Tuning) -> tuple[Intermediates, Sizes]:
    (R, D), N, H = x_RD.shape, cfg.num_attention_heads, cfg.head_dim
    K, positions = cfg.num_key_value_heads, rows.table_RM.shape[1] * kv_PSCH.shape[1]
    useful = pl.cdiv(positions, max(tuning.attention.min_keys, tuning.attention.block))
    X = max(1, min(tuning.programs // (R * K), useful, MOST_SPLITS))

    def shape(*sizes: int, dtype=x_RD.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    intermediates = Intermediates(
        qkv_RW=shape(R, (N + 2 * K) * H),
        o_RXNH=shape(R, X, N, H, dtype=jnp.float32),
        lse_RXN=shape(R, X, N, dtype=jnp.float32),
        x_RD=shape(R, D),
        h_RF=shape(R, cfg.intermediate_size),
    )
    return intermediates, Sizes(group=N // K, head_dim=H, eps=cfg.rms_norm_eps, splits=X)


def _options(interpret: bool, tuning: Tuning) -> dict:
    params = triton.CompilerParams(num_warps=tuning.warps, num_stages=1)
    return {"interpret": interpret, "compiler_params": params}


def _layer(
    old_kv,
    old_barriers,
    x_RD,
    weights,
    rows,
    y_RD,
    kv_PSCH,
    barriers,
    intermediates,
    *,
    sizes,
    tuning,
):
    """All phases. Each loads its first weights, then waits for the previous phase's results."""
    del old_kv, old_barriers  # the same memory as kv_PSCH and barriers
    options = {"sizes": sizes, "tuning": tuning}
    qkv_RW, o_RXNH, lse_RXN = intermediates.qkv_RW, intermediates.o_RXNH, intermediates.lse_RXN
    phases = (
        matmul_phases.qkv(x_RD, weights, qkv_RW, **options),
        attention_phases.attend(None, qkv_RW, rows, o_RXNH, lse_RXN, kv_PSCH, **options),
        matmul_phases.o(o_RXNH, lse_RXN, rows, x_RD, weights, intermediates.x_RD, **options),
        matmul_phases.gate_up(intermediates.x_RD, weights, intermediates.h_RF, **options),
        matmul_phases.down(intermediates.h_RF, intermediates.x_RD, weights, y_RD, **options),
    )
    for index, (load, work) in enumerate(phases):
        # A barrier can be reset once no program can be waiting at it: when all have passed the next
        # one, and the last barrier when the next kernel has begun.
        if index == 0:
            loaded = load()
            _reset(barriers, NUM_BARRIERS - 1)
        else:
            _arrive(barriers, index - 1)
            loaded = load()
            _wait(barriers, index - 1, tuning=tuning)
        if index > 1:
            _reset(barriers, index - 2)
        work(loaded)


def _alone(phase: tuple[Callable, Callable]) -> None:
    load, work = phase
    work(load())


def _arrive(barriers, index: int) -> None:
    """Tells all programs that everything this program wrote before is visible."""
    triton.debug_barrier()  # all of this program's threads have written
    triton.atomic_add(barriers, (index,), 1)


def _wait(barriers, index: int, *, tuning: Tuning) -> None:
    """Waits until every program has arrived. One thread polls, to leave bandwidth to arrivals.

    It polls without a fence, which would also wait for the weights that are being loaded. None is
    needed: data read after a barrier is at addresses that this kernel has not read before, and so
    cannot be stale in a multiprocessor's own cache.
    """
    thread = jnp.arange(32 * tuning.warps)
    at = barriers.at[jnp.full(thread.shape, index)]

    def poll(_) -> jax.Array:
        return jnp.min(triton.load(at, mask=thread == 0, other=tuning.programs, volatile=True))

    arrived = jax.lax.while_loop(lambda arrived: arrived < tuning.programs, poll, poll(None))

    @pl.when(arrived < 0)
    def _():
        barriers[index] = 0  # never runs; a loop whose result is unused would be removed

    triton.debug_barrier()


def _reset(barriers, index: int) -> None:
    @pl.when(pl.program_id(0) == 0)
    def _():
        barriers[index] = 0
