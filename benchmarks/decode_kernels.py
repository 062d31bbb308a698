"""The kernels for few rows: microseconds a layer and GB/s, by how the work is cut.

    python benchmarks/decode_kernels.py                  # on a GPU: 0.5B at 1 to 8 rows
    python benchmarks/decode_kernels.py --model 1.5b     # another size
    python benchmarks/decode_kernels.py --parts check,step,profile
    python benchmarks/decode_kernels.py --tiny           # rehearsal on a CPU

check: one layer and the output projection against the model's own. layer: all layers in a row, for
several tunings, and the same by XLA. head: the output projection. step: `paged_decode.advance`,
whole steps. profile: the kernels of such a step. Bytes are those of the weights.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from qwen_jax.decode import programs as decode_programs
from qwen_jax.decode import sampling, slot_state, weights
from qwen_jax.decode import small_batch_step as small_batch
from qwen_jax.decode.small_batch import (
    attention_phases,
    kernel_types,
    layer_kernel,
    lm_head,
    matmul_phases,
)
from qwen_jax.model import rope, transformer
from qwen_jax.ops.attention.paged import api as paged
from qwen_jax.ops.attention.paged import triton_blocks

PAGE, POSITIONS, LENGTH = 64, 1280, 1152


@dataclasses.dataclass
class Setup:
    """A model with random weights, and requests of some length."""

    cfg: ModelConfig
    weights: weights.DecodeWeights
    programs: int
    interpret: bool
    repeats: int

    def state(self, R: int) -> slot_state.State:
        """R slots in the middle of an answer."""
        M = POSITIONS // PAGE
        state = slot_state.empty(
            self.cfg, num_slots=R, width=M, num_pages=R * M, page_size=PAGE, dtype=jnp.bfloat16
        )
        slots = dataclasses.replace(
            state.slots,
            table_BM=jnp.arange(R * M, dtype=jnp.int32).reshape(R, M),
            lengths_B=jnp.full(R, LENGTH - 1, jnp.int32),
            tokens_B=jnp.arange(R, dtype=jnp.int32),
            remaining_B=jnp.full(R, 10**6, jnp.int32),
        )
        return slot_state.State(state.pages, slots)


def make(name: str, *, tiny: bool) -> Setup:
    cfg = qwen2_5.tiny() if tiny else qwen2_5.base(name)
    init = jax.jit(lambda: jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), transformer.init(cfg, jax.random.key(0))
    ))  # fmt: skip
    prepared = weights.prepare(cfg, init(), dtype=jnp.bfloat16, form="output_major")
    programs = 4 if tiny else small_batch.multiprocessors()
    return Setup(cfg, prepared, programs, interpret=tiny, repeats=1 if tiny else 20)


def seconds(run, setup: Setup) -> float:
    """Seconds of one call, of several in flight, after two calls to warm up."""
    for _ in range(2):
        jax.block_until_ready(run())
    begin = time.perf_counter()
    results = [run() for _ in range(setup.repeats)]
    jax.block_until_ready(results)
    return (time.perf_counter() - begin) / setup.repeats


def plain_layer(cfg, x_RD, values, kv_PSCH, rows, rotation):
    """The layer's result, computed by the model's own operations."""

    def attend(q_R1NH, k_R1KH, v_R1KH):
        o_RNH, kept = paged.append(
            q_R1NH[:, 0], k_R1KH[:, 0], v_R1KH[:, 0], kv_PSCH,
            table_BM=rows.table_RM, lengths_B=rows.lengths_R,
        )  # fmt: skip
        return o_RNH[:, None], kept

    x_R1D, kept, _ = weights.blocks(cfg, "output_major")["layers"].bind(values)(
        x_RD[:, None], rotation=rotation, attend=attend, layout=None
    )
    return x_R1D[:, 0], kept


def shared_of(setup: Setup, state: slot_state.State) -> tuple[kernel_types.Rows, rope.Rotation]:
    lengths_R = state.slots.lengths_B + 1
    rotation = rope.rotation(setup.cfg, lengths_R[:, None] - 1)
    rows = kernel_types.Rows(
        rotation.cos_BTh[:, 0], rotation.sin_BTh[:, 0], state.slots.table_BM, lengths_R
    )
    return rows, rotation


def tunings(setup: Setup, *, tiny: bool) -> dict[str, kernel_types.Tuning]:
    base = kernel_types.Tuning(programs=setup.programs, launch="phase" if tiny else "layer")
    if tiny:
        return {"base": base}
    change = functools.partial(dataclasses.replace, base)
    keys = [(64, 64), (64, 128), (128, 256)]
    return {
        "base": base,
        "8 warps": change(warps=8),
        **{
            f"attention {block}, {least}": change(
                attention=triton_blocks.Tuning(block=block, min_keys=least)
            )
            for block, least in keys
        },
        "qkv 16": change(qkv=16),
        "gate_up 16": change(gate_up=16),
        **{f"without {name}": change() for name in _PHASES},
        "barriers alone": change(),
        "five launches": change(launch="phase"),
    }


_PHASES = {
    "qkv": (matmul_phases, "qkv"),
    "attention": (attention_phases, "attend"),
    "o": (matmul_phases, "o"),
    "gate_up": (matmul_phases, "gate_up"),
    "down": (matmul_phases, "down"),
}


@contextlib.contextmanager
def without(name: str):
    """The layer without one phase, or without all, to time the phases; its results are wrong."""
    some = [place for one, place in _PHASES.items() if name in (f"without {one}", "barriers alone")]
    kept = [getattr(*place) for place in some]
    jax.clear_caches()
    for place in some:
        setattr(*place, lambda *_, **__: (lambda: None, lambda _: None))
    try:
        yield
    finally:
        for place, function in zip(some, kept, strict=True):
            setattr(*place, function)


def check(setup: Setup, R: int, tuning: kernel_types.Tuning) -> None:
    """Relative errors of a layer and of the logits, and whether the tokens are the same."""
    cfg, state = setup.cfg, setup.state(R)
    rows, rotation = shared_of(setup, state)
    x_RD = jax.random.normal(jax.random.key(3), (R, cfg.hidden_size), jnp.bfloat16)
    kv = jax.random.normal(jax.random.key(4), state.pages.layers[0].shape, jnp.bfloat16)
    values = setup.weights.layers[0]
    want, kept = jax.jit(functools.partial(plain_layer, cfg))(x_RD, values, kv, rows, rotation)
    run = jax.jit(
        functools.partial(layer_kernel.run, cfg, tuning=tuning, interpret=setup.interpret)
    )
    worst = 0.0
    for _ in range(3):
        got, kept_few, barriers = run(
            x_RD, layer_kernel.weights(cfg, values), kv, rows, small_batch.barriers()
        )
        error = jnp.linalg.norm((got - want).astype(jnp.float32))
        worst = max(worst, float(error / jnp.linalg.norm((want - x_RD).astype(jnp.float32))))
    pages = float(jnp.abs(kept_few.astype(jnp.float32) - kept.astype(jnp.float32)).max())
    scale, table = setup.weights.params["norm"]["scale"], setup.weights.params["embed"]["weight"]
    options = {"eps": cfg.rms_norm_eps, "interpret": setup.interpret}
    options["tuning"] = lm_head.Tuning(programs=2 * setup.programs)
    logits = lm_head.logits(x_RD, scale, table, **options)
    normed = transformer.definitions(cfg)["norm"].bind(setup.weights.params["norm"])(x_RD)
    other = transformer.unembed(cfg, setup.weights.params, normed[:, None])[:, 0]
    off = float(jnp.linalg.norm(logits - other) / jnp.linalg.norm(other))
    tokens = lm_head.likeliest(x_RD, scale, table, **options)
    same = bool((tokens == jnp.argmax(logits, axis=-1)).all())
    print(
        f"check {R} rows: layer off by {worst:.5f} of what it adds, pages by {pages:.4f}, logits "
        f"by {off:.6f}; tokens right: {same}; barriers left {barriers.tolist()}", flush=True
    )  # fmt: skip


def time_layers(
    setup: Setup, R: int, name: str, tuning: kernel_types.Tuning | None, steps: int
) -> None:
    cfg, state = setup.cfg, setup.state(R)
    rows, rotation = shared_of(setup, state)
    values = setup.weights.layers

    def step(values, rows, rotation, carry):
        x_RD, pages, barriers = carry
        kept = []
        for one, kv in zip(values, pages, strict=True):
            if tuning is None:
                x_RD, kv = plain_layer(cfg, x_RD, one, kv, rows, rotation)
            else:
                x_RD, kv, barriers = jitted(
                    cfg, x_RD, layer_kernel.weights(cfg, one), kv, rows, barriers,
                    tuning=tuning, interpret=setup.interpret,
                )  # fmt: skip
            kept.append(kv)
        return x_RD, tuple(kept), barriers

    jitted = jax.jit(layer_kernel.run, static_argnames=("cfg", "tuning", "interpret"))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(pages, x_RD, barriers, *others):
        body = lambda _, carry: step(*others, carry)  # noqa: E731
        return jax.lax.fori_loop(0, steps, body, (x_RD, pages, barriers))

    pages = [state.pages.layers]
    x_RD = jnp.ones((R, cfg.hidden_size), jnp.bfloat16)

    def again():
        y_RD, pages[0], _ = run(pages[0], x_RD, small_batch.barriers(), values, rows, rotation)
        return y_RD

    began = time.perf_counter()
    try:
        with without(name):
            jax.block_until_ready(again())
        compiled = time.perf_counter() - began
        each = seconds(again, setup) / steps / len(values)
    except Exception as error:  # the other ways may still run
        print(f"layer {R} rows {name:18} failed: {str(error)[:300]}", flush=True)
        return
    size = sum(x.nbytes for x in jax.tree.leaves(values)) / len(values)
    print(
        f"layer {R} rows {name:18} {each * 1e6:7.2f} us {size / each / 1e9:6.0f} GB/s "
        f"(compiled in {compiled:.0f} s)",
        flush=True,
    )


def time_head(setup: Setup, R: int, tuning: lm_head.Tuning | None) -> None:
    cfg, table = setup.cfg, setup.weights.params["embed"]["weight"]
    options = {"eps": cfg.rms_norm_eps, "tuning": tuning, "interpret": setup.interpret}

    params = {name: setup.weights.params[name] for name in ("norm", "embed")}

    def tokens(params, x_RD):
        if tuning is not None:
            scale, table = params["norm"]["scale"], params["embed"]["weight"]
            return lm_head.likeliest(x_RD, scale, table, **options)
        normed = transformer.definitions(cfg)["norm"].bind(params["norm"])(x_RD)
        return sampling.argmax(transformer.unembed(cfg, params, normed[:, None])[:, 0])

    def several(params, x_RD):
        def body(_, token_R):
            return tokens(params, x_RD + (token_R[:, None] * 1e-6).astype(x_RD.dtype))

        return jax.lax.fori_loop(0, 10, body, jnp.zeros(R, jnp.int32))

    run = jax.jit(several)
    x_RD = jax.random.normal(jax.random.key(5), (R, cfg.hidden_size), jnp.bfloat16)
    each = seconds(lambda: run(params, x_RD), setup) / 10
    name = "XLA" if tuning is None else f"{tuning.programs} x {tuning.warps}, {tuning.outputs}"
    print(f"head {R} rows {name:18} {each * 1e6:7.1f} us {table.nbytes / each / 1e9:6.0f} GB/s",
          flush=True)  # fmt: skip


def time_step(setup: Setup, R: int, ways: tuple, *, profile: bool) -> None:
    """Times whole steps of the engine's program."""
    cfg, steps = setup.cfg, 16
    size = sum(x.nbytes for x in jax.tree.leaves(setup.weights))
    mask_RW = jnp.full((R, -(-cfg.vocab_size // 32)), 2**32 - 1, jnp.uint32)
    for way in ways:
        state = [setup.state(R)]

        def again(way=way, state=state):
            state[0], drawn = decode_programs.advance(
                cfg, setup.weights, state[0], jnp.arange(R), mask_RW, sampler="greedy",
                eos_E=jnp.zeros(0, jnp.int32), num_steps=steps, layers=way,
            )  # fmt: skip
            return drawn.tokens_B

        each = seconds(again, setup) / steps
        print(
            f"step {R} rows {way:8} {each * 1e3:.4f} ms {size / each / 1e9:6.0f} GB/s "
            f"{R / each:,.0f} tokens/s", flush=True
        )  # fmt: skip
        if profile:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    jax.block_until_ready(again())
                print_kernels(pathlib.Path(folder), steps=steps)


def print_kernels(folder: pathlib.Path, *, steps: int, limit: int = 20) -> None:
    """The kernels of a trace by total time, per step."""
    (path,) = folder.rglob("*.xplane.pb")
    times = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                for event in line.events if line.name.startswith("Stream") else ():
                    times[event.name].append(event.duration_ns / 1e3)
    busy, count = (sum(f(some) for some in times.values()) / steps for f in (sum, len))
    print(f"    {count:.0f} kernels a step, busy {busy:.0f} us a step")
    for name, some in sorted(times.items(), key=lambda kv: -sum(kv[1]))[:limit]:
        each = sum(some) / len(some)
        print(f"    {sum(some) / steps:9.1f} us {len(some) / steps:7.1f} x {each:8.2f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", default="0.5b")
    parser.add_argument("--parts", default="check,layer,head,step")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; none begins later")
    arguments = parser.parse_args()
    began, parts = time.monotonic(), arguments.parts.split(",")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    setup = make(arguments.model, tiny=arguments.tiny)
    rows = [int(R) for R in arguments.rows.split(",")]
    table = tunings(setup, tiny=arguments.tiny)
    work = []
    for R in rows:
        if "check" in parts:
            work.append(functools.partial(check, setup, R, table["base"]))
        if "step" in parts or "profile" in parts:
            ways = ("xla",) if arguments.tiny else ("kernels", "xla")
            work.append(functools.partial(time_step, setup, R, ways, profile="profile" in parts))
    for R in rows:
        if "layer" in parts:
            steps = 1 if arguments.tiny else 8
            some = table if rows[0] == R else {"base": table["base"]}
            for name, tuning in {**some, "XLA": None}.items():
                work.append(functools.partial(time_layers, setup, R, name, tuning, steps))
        if "head" in parts:
            cuts = [(2, 16, 8), (4, 16, 8), (4, 8, 4), (8, 8, 4), (2, 32, 8), (3, 16, 8)]
            for times, outputs, warps in cuts[:1] if rows[0] != R or arguments.tiny else cuts:
                tuning = lm_head.Tuning(
                    programs=times * setup.programs, outputs=outputs, warps=warps
                )
                work.append(functools.partial(time_head, setup, R, tuning))
            work.append(functools.partial(time_head, setup, R, None))
    for one in work:
        if time.monotonic() - began > arguments.budget:
            print("# out of time")
            return
        one()


if __name__ == "__main__":
    main()
