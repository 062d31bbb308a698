"""Training in 8 bits: a step in bf16, fp8 and int8, and the losses of 30 steps.

    python benchmarks/quantised_train.py            # 1.5B at 4 x 4,096 on one H100, 3 minutes
    python benchmarks/quantised_train.py --tiny     # rehearsal on a CPU

The products of the layers' matrices (forward, and both of the backward pass) run in 8 bits;
attention, norms and the output projection stay as they are. `qwix` is the quantised product of that
library, called without its interception of Flax modules; `xla` is written as XLA's fp8 rewriter
wants it: one power-of-two scale a tensor, converted and scaled before a bf16 product. Weights and
moments stay float32. The text is Python's own library, a byte a token: the same for all variants.
qwix 0.1.8 needs nothing but what this project installs; the wheel must be unpacked to be imported.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from configs.data import DataConfig
from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from configs.optimizer import OptimizerConfig
from configs.train import TrainConfig
from partitioning import mesh, rules, sharding
from qwen_jax.model import layers
from train.core import step as step_lib

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def scaled(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x rounded to `dtype` under one power-of-two scale, and back: what XLA's rewriter matches."""
    peak = jnp.max(jnp.abs(x)).astype(jnp.float32)
    exponent = jnp.ceil(jnp.log2(jnp.maximum(peak, 1e-30) / float(jnp.finfo(dtype).max)))
    scale = jnp.exp2(exponent).astype(x.dtype)  # exact in bf16
    return (x / scale).astype(dtype).astype(x.dtype) * scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def xla_fp8(lhs: jax.Array, rhs: jax.Array, dims) -> jax.Array:
    return jax.lax.dot_general(scaled(lhs, E4M3), scaled(rhs, E4M3), dims)


def _xla_fp8_backward(dims, residuals, gradient):
    lhs, rhs = (scaled(x, E4M3) for x in residuals)
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
    return jax.vjp(product, lhs, rhs)[1](scaled(gradient, E5M2))


xla_fp8.defvjp(lambda lhs, rhs, dims: (xla_fp8(lhs, rhs, dims), (lhs, rhs)), _xla_fp8_backward)


def xla(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **_):
    del precision, preferred_element_type
    return xla_fp8(lhs, rhs, dimension_numbers)


def qwix(*, forward: str, backward: str | None, per_tensor: bool):
    """qwix's product with its own backward pass; `backward=None` leaves that one in bf16."""
    from qwix._src.core import dot_general_qt  # the function behind its QtProvider

    config = dot_general_qt.DotGeneralQtConfig(
        lhs_qtype=forward,
        rhs_qtype=forward,
        dlhs_grad_qtype=backward,
        drhs_grad_qtype=backward,
        lhs_disable_channelwise_axes=per_tensor,
        rhs_disable_channelwise_axes=per_tensor,
        dlhs_grad_disable_channelwise_axes=per_tensor,
        drhs_grad_disable_channelwise_axes=per_tensor,
        use_original_residuals=backward is None,
        disable_gradient_clipping=True,  # absmax: nothing is clipped
    )

    def product(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **_):
        del precision, preferred_element_type
        return dot_general_qt.dot_general_qt(lhs, rhs, dimension_numbers, config)

    return product


VARIANTS = {  # in the order of their worth, should time run out
    "bf16": lambda: jax.lax.dot_general,
    "fp8, xla": lambda: xla,
    "fp8, qwix, a scale a tensor": lambda: qwix(
        forward="float8_e4m3fn", backward="float8_e5m2", per_tensor=True
    ),
    "int8, qwix": lambda: qwix(forward="int8", backward="int8", per_tensor=False),
    "fp8, qwix": lambda: qwix(forward="float8_e4m3fn", backward="float8_e5m2", per_tensor=False),
    "int8 forward only, qwix": lambda: qwix(forward="int8", backward=None, per_tensor=False),
}


@contextlib.contextmanager
def products_by(product):
    """Every `layers.Linear` multiplies by `product` meanwhile."""
    original = layers.jnp

    class Numpy:
        einsum = staticmethod(functools.partial(jnp.einsum, _dot_general=product))

        def __getattr__(self, name: str):
            return getattr(original, name)

    layers.jnp = Numpy()
    try:
        yield
    finally:
        layers.jnp = original


def median_ms(run, *, repeats: int = 5) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def print_products(tokens: int, shapes: dict[str, tuple[int, int]]) -> None:
    """TFLOP/s of products [tokens, K] x [K, N] of values that are 8-bit already, 8 in a program."""
    kinds = {"bf16": (jnp.bfloat16, jnp.bfloat16), "e4m3": (E4M3, jnp.bfloat16)}
    kinds["int8"] = (jnp.int8, jnp.int32)
    print(f"{'product':24}" + "".join(f"{kind:>10}" for kind in kinds) + "   TFLOP/s", flush=True)
    for name, (k, n) in shapes.items():
        print(f"{name:24}", end="")
        for dtype, out in kinds.values():
            x = (7 * jax.random.normal(jax.random.key(0), (tokens, k))).astype(dtype)
            w = (7 * jax.random.normal(jax.random.key(1), (8, k, n))).astype(dtype)
            product = functools.partial(jnp.matmul, preferred_element_type=out)
            run = jax.jit(lambda x, w, product=product: [product(x, one) for one in w])
            try:
                cell = f"{8 * 2e-9 * tokens * k * n / median_ms(functools.partial(run, x, w)):.0f}"
            except Exception as error:
                cell = type(error).__name__[:9]
            print(f"{cell:>10}", end="", flush=True)
        print()


def batches(cfg: ModelConfig, batch: int, length: int):
    """Python's library as bytes, batch after batch; the same ones at every call."""
    files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    text = np.frombuffer(b"".join(f.read_bytes() for f in files), np.uint8).astype(np.int32)
    shape = (batch, length)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    for start in range(0, len(text) - batch * length - 1, batch * length):
        rows = text[start : start + batch * length + 1] % cfg.vocab_size
        yield {
            "tokens": rows[:-1].reshape(shape),
            "targets": rows[1:].reshape(shape),
            "segment_ids": None,
            "positions": place,
            "loss_weights": np.ones(shape, np.float32),
        }


def measure(cfg: ModelConfig, config: TrainConfig, *, steps: int) -> dict:
    """Seconds to compile, GB of temporaries, median ms of a step, and every step's loss."""
    layout = sharding.Layout(mesh.make(config.mesh), rules.rule_set("train"))
    program = step_lib.make(cfg, config, layout)
    source = batches(cfg, config.batch_size, config.data.sequence_length)
    batch = next(source)
    begin = time.perf_counter()
    state, _, rate = program.inputs  # rows are not packed: the batch has no segment ids
    compiled = program.step.lower(state, batch, rate).compile()
    compile_s = time.perf_counter() - begin
    text = compiled.as_text()
    state = program.init(jax.random.key(0))
    times, losses = [], []
    for index in range(steps):
        begin = time.perf_counter()
        state, metrics = compiled(state, batch, program.learning_rate(index))
        losses.append(float(metrics["loss"]))
        times.append(1e3 * (time.perf_counter() - begin))
        batch = next(source)
    return {
        "compile_s": compile_s,
        "temp_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "ms": statistics.median(times[3:]),
        "losses": losses,
        "fp8_calls": text.count('custom_call_target="__cublas$lt$matmul$f8"'),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.5b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--budget", type=float, default=170, help="seconds; then none is begun")
    parser.add_argument("--remat", default="minimal")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    begin = time.perf_counter()
    if args.tiny:
        args.model, args.batch, args.length, args.steps = "tiny", 2, 64, 6
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    cfg = qwen2_5.tiny() if args.tiny else qwen2_5.base(args.model)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.model}, ", end="")
    print(f"{args.batch} x {args.length}, layers scanned, remat {args.remat}", flush=True)
    config = TrainConfig(
        batch_size=args.batch,
        num_steps=1000,
        remat=args.remat,
        data=DataConfig(sequence_length=args.length),
        loss_chunk=min(1024, args.length),
        optimizer=OptimizerConfig(peak_learning_rate=3e-4, schedule="constant", warmup_steps=10),
    )
    results = {}
    for name, make in VARIANTS.items():
        if args.only not in name:
            continue
        if time.perf_counter() - begin > args.budget:
            print(f"{name:30} not begun: {args.budget:.0f} s are over")
            continue
        try:
            with products_by(make()):
                result = measure(cfg, config, steps=args.steps)
        except Exception as error:  # a variant that cannot run must not cost the others
            print(f"{name:30} failed: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        results[name] = result
        print(
            f"{name:30} {result['ms']:8.1f} ms/step  {result['temp_gb']:6.1f} GB temporaries  "
            f"compiled in {result['compile_s']:3.0f} s, {result['fp8_calls']} fp8 calls of cuBLAS, "
            f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}",
            flush=True,
        )
    print("\nlosses" + "".join(f"{name[:22]:>24}" for name in results))
    for i in range(args.steps):
        print(f"{i:6}" + "".join(f"{r['losses'][i]:24.4f}" for r in results.values()))
    D, F, H = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    q = cfg.num_attention_heads * H
    print()
    print_products(args.batch * args.length, {"q": (D, q), "mlp up": (D, F), "mlp down": (F, D)})
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
