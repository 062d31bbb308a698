"""Decoding speed on one device: ceilings, then models and forms of parameters, in one table.

    python benchmarks/decode.py                  # on a GPU
    python benchmarks/decode.py --tiny           # rehearsal on a CPU
    python benchmarks/decode.py --only 0.5b,7b   # cases whose name holds one of these
    python benchmarks/decode.py --profile        # and the kernels each step spends its time in
    python benchmarks/decode.py --peers          # and transformers, where torch has a GPU

Weights are random: only their bytes matter. A step reads every weight but the embedding table
(one row a token, unless it is tied to the output) and the cache's filled positions; the ratio is
that traffic over the bandwidth of a large copy, read and write counted.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from configs import qwen2_5, schema
from qwen_jax import decode, kv_cache, model, sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a model, a batch, and how its program is made."""

    size: str
    batch: int = 1
    form: str = "fused"
    stop: str = "dispatch"
    rows: int = 0  # rows of the arrays, where padding the batch is tried; 0: the batch
    options: tuple[tuple[str, bool | int | str], ...] = ()  # XLA's, for this program only
    note: str = ""

    @property
    def name(self) -> str:
        """For the table and for --only."""
        parts = [self.size, f"b{self.batch}", self.form]
        parts += [f"stop={self.stop}"] if self.stop != "dispatch" else []
        parts += [f"rows={self.rows}"] if self.rows else []
        parts += [self.note] if self.note else []
        return " ".join(parts)


def cases(tiny: bool) -> list[Case]:
    """In an order that lets one set of weights pass from form to form."""
    if tiny:
        return [Case(size="tiny", form=form) for form in ("stacked", "unstacked", "fused")] + [
            Case(size="tiny", batch=4),
            Case(size="tiny", stop="step"),
            Case(size="tiny", rows=8),
        ]
    both = []
    for size in ("7b", "0.5b"):
        both += [
            Case(size=size, form="stacked"),
            Case(size=size, form="unstacked"),
            Case(size=size),
            Case(size=size, rows=8),
            Case(size=size, batch=64),
        ]
    return both


def median_seconds(run, *, repeats: int) -> float:
    """Of `repeats` runs after one to warm up; `run` returns arrays to wait for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def ceilings(tiny: bool) -> tuple[float, float, float]:
    """Bytes/s of a copy (read and write), bytes/s of a sum (read), FLOP/s of a bf16 product."""
    count = 2**24 if tiny else 2**31
    x = jnp.ones((count,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    total = jax.jit(lambda x: jnp.sum(x.reshape(-1, 4096), axis=-1, dtype=jnp.float32))
    copied = 2 * x.nbytes / median_seconds(lambda: copy(x), repeats=20)
    summed = x.nbytes / median_seconds(lambda: total(x), repeats=20)
    n = 1024 if tiny else 8192
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return copied, summed, 2 * n**3 / median_seconds(lambda: product(a), repeats=20)


def random_params(cfg: schema.Model) -> dict:
    """Stacked bfloat16 weights, made on the device leaf by leaf."""

    @functools.partial(jax.jit, static_argnums=1)
    def make(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    leaves, tree = jax.tree.flatten(model.shapes(cfg, dtype=jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([make(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def step_bytes(cfg: schema.Model, params: dict, *, batch: int, positions: int) -> int:
    """Bytes of weights and filled cache that one step must read."""
    read = {k: v for k, v in params.items() if cfg.tie_word_embeddings or k != "embed"}
    cache = kv_cache.num_bytes(cfg, num_slots=batch, length=positions, dtype=jnp.bfloat16)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read)) + cache


def measure(case: Case, cfg: schema.Model, params: dict, args) -> tuple[float, float]:
    """Milliseconds a step, and seconds it took to compile."""
    rows = case.rows or case.batch
    greedy = [schema.Sampling(temperature=0.0)] * case.batch
    settings = sampling.settings(greedy, num_rows=rows)
    steps = 8 if args.tiny else args.steps
    eos_E = jnp.zeros((0,), jnp.int32)
    common = {"how": "greedy", "eos_E": eos_E}
    tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, args.prompt))
    begin = time.perf_counter()
    state, _ = decode.start(
        cfg,
        params,
        tokens_BT.astype(np.int32),
        np.full(rows, args.prompt, np.int32),
        np.full(rows, 10**6, np.int32),
        jax.device_put(settings),
        length=args.cache,
        dtype=jnp.bfloat16,
        **common,
    )
    settings = jax.device_put(settings)
    program = decode.advance.lower(
        cfg, params, state, settings, num_steps=steps, stop=case.stop, **common
    ).compile(compiler_options=dict(case.options))
    compiled = time.perf_counter() - begin
    times = []
    for _ in range(2 + args.repeats):
        begin = time.perf_counter()
        state, tokens = program(params, state, settings, eos_E=eos_E)
        tokens.block_until_ready()
        times.append((time.perf_counter() - begin) / steps)
    if args.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, tokens = program(params, state, settings, eos_E=eos_E)
                tokens.block_until_ready()
            print_kernels(pathlib.Path(folder), steps=steps)
    return 1e3 * statistics.median(times[2:]), compiled


def print_kernels(folder: pathlib.Path, *, steps: int, limit: int = 25) -> None:
    """The kernels of a trace by total time, per step."""
    (path,) = folder.rglob("*.xplane.pb")
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                totals[event.name][0] += event.duration_ns / 1e3
                totals[event.name][1] += 1
    busy = sum(total for total, _ in totals.values()) / steps
    count = sum(number for _, number in totals.values()) / steps
    print(f"    {count:.0f} kernels a step, busy {busy:.0f} us a step")
    for name, (total, number) in sorted(totals.items(), key=lambda kv: -kv[1][0])[:limit]:
        print(f"    {total / steps:9.1f} us {number / steps:7.1f} x {total / number:8.2f}  {name}")


def peer(size: str, batch: int, prompt: int, new_tokens: int) -> float:
    """Milliseconds a step of transformers' generate with a static, compiled cache."""
    import torch
    import transformers

    cfg = qwen2_5.base(size)
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        tie_word_embeddings=cfg.tie_word_embeddings,
        eos_token_id=None,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        network = transformers.Qwen2ForCausalLM(config).eval()
        ids = torch.randint(0, cfg.vocab_size, (batch, prompt))
    options = {"do_sample": False, "cache_implementation": "static", "eos_token_id": None}

    def seconds(count: int) -> float:
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            network.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[2:])

    # The same total length, so that the static cache and its compiled step are the same.
    return 1e3 * (seconds(new_tokens) - seconds(2)) / (new_tokens - 2)


def run_peer(size: str, batch: int, args) -> str | float:
    """`peer` in its own process, so that its memory is given back; a reason if it cannot run."""
    command = [sys.executable, __file__, "--peer", size, "--peer-batch", str(batch)]
    command += ["--prompt", str(args.prompt)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "took more than 300 s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:160]
    return json.loads(lines[-1])["ms"]


def config_of(size: str) -> schema.Model:
    """A published size, or the tiny model."""
    return qwen2_5.tiny() if size == "tiny" else qwen2_5.base(size)


def report(name: str, ms: float, *, batch: int, traffic: int, copied: float, note: str) -> str:
    """One printed row; returns it for the table at the end."""
    achieved = traffic / (ms / 1e3)
    row = (
        f"{name:44} {ms:8.3f} ms  {batch * 1e3 / ms:9.1f} tok/s  {traffic / 1e9:7.3f} GB  "
        f"{achieved / 1e9:7.0f} GB/s  {100 * achieved / copied:5.1f}% of copy  {note}"
    )
    print(row, flush=True)
    return row


def run_cases(args, copied: float) -> list[str]:
    """Measures what is asked for; a case that fails is a row that says why."""
    table, held = [], None
    wanted = [c for c in cases(args.tiny) if not args.only or any(o in c.name for o in args.only)]
    for case in wanted:
        if time.perf_counter() - args.begin > args.budget:
            table.append(f"{case.name:44} skipped: the budget of {args.budget} s is spent")
            continue
        cfg = config_of(case.size)
        order = ("stacked", "unstacked", "fused")
        if held is None or held[0] != case.size or order.index(held[1]) > order.index(case.form):
            held = None  # frees the last model before the next is made
            held = (case.size, "stacked", random_params(cfg))
        if held[1] != case.form:
            params = decode.prepare(cfg, held[2], dtype=jnp.bfloat16, form=case.form)
            held = (case.size, case.form, params)
        positions = args.prompt + (2 + args.repeats // 2) * args.steps
        traffic = step_bytes(cfg, held[2], batch=case.batch, positions=positions)
        try:
            ms, compiled = measure(case, cfg, held[2], args)
        except Exception as error:  # a variant that cannot run must not cost the others
            table.append(f"{case.name:44} failed: {str(error).splitlines()[0][:160]}")
            print(table[-1], flush=True)
            continue
        note = f"(compiled in {compiled:.0f} s)"
        table.append(
            report(case.name, ms, batch=case.batch, traffic=traffic, copied=copied, note=note)
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--only", type=lambda text: text.split(","), help="parts of case names")
    parser.add_argument("--profile", action="store_true", help="print each case's kernels")
    parser.add_argument("--peers", action="store_true", help="measure transformers too (minutes)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in the cache at first")
    parser.add_argument("--cache", type=int, default=1024, help="positions of the cache")
    parser.add_argument("--steps", type=int, default=32, help="steps a dispatch")
    parser.add_argument("--repeats", type=int, default=10, help="dispatches timed")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which to stop")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--peer-batch", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.begin = time.perf_counter()
    if args.peer:
        print(json.dumps({"ms": peer(args.peer, args.peer_batch, args.prompt, 128)}))
        return
    needed = args.prompt + (3 + args.repeats) * args.steps
    if needed > args.cache:
        parser.error(f"--cache {args.cache} is shorter than the {needed} positions to be filled")
    peers = {}
    if args.peers:
        for size, batch in (("0.5b", 1), ("7b", 1)):
            peers[size, batch] = run_peer(size, batch, args)
    device = jax.devices()[0]
    print(f"{device.device_kind}, {device.platform}, jax {jax.__version__}")
    copied, summed, flops = ceilings(args.tiny)
    ceiling = (
        f"ceilings: copy {copied / 1e9:.0f} GB/s, read {summed / 1e9:.0f} GB/s, "
        f"bf16 product {flops / 1e12:.0f} TFLOP/s"
    )
    print(ceiling, flush=True)
    table = run_cases(args, copied)
    for (size, batch), ms in peers.items():
        name = f"{size} b{batch} transformers, static cache"
        if isinstance(ms, str):
            table.append(f"{name:44} failed: {ms}")
            continue
        cfg = config_of(size)
        traffic = step_bytes(cfg, model.shapes(cfg, dtype=jnp.bfloat16), batch=batch, positions=192)
        table.append(report(name, ms, batch=batch, traffic=traffic, copied=copied, note=""))
    print("\n" + ceiling)
    print("\n".join(table))


if __name__ == "__main__":
    main()
