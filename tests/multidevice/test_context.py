"""Attention over a context axis: one device's numbers, a part of its memory, known collectives.

Moved by one attention and its gradient, in n parts, where segment ids go with keys and values:

ring        forward: k, v, ids before the own block, and in the loop of n - 2 rounds. Backward: the
            same before the own block and before the first visit's, and in the loop of n - 3 rounds,
            there with the float32 gradients of k and v, which move twice more: before the last
            visit's block, and home.
all_gather  forward: k, v, ids. Backward: again, and two reduce-scatters.
ulysses     forward: q, k, v, o by all-to-all, and ids gathered. Backward: their gradients.
"""

import functools
from collections import Counter

import jax
import numpy as np
import pytest

from partitioning import mesh, ring, rules, sharding
from qwen_jax.ops.attention import api, context_parallelism
from tests.multidevice import cases, hlo

B, T, N, K, H = 4, 64, 8, 8, 32


def _layout(text: str, *, num_devices: int = 8) -> sharding.Layout:
    config = mesh.parse(text)
    made = mesh.make(config, devices=jax.devices()[:num_devices])
    return sharding.Layout(made, rules.rule_set("train", kv_heads=config.kv_heads))


def _inputs(K: int = K):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, (N, K, K, N), strict=True)]


def _segments() -> np.ndarray:
    """Documents that end inside chunks and at their ends, one document, and padding."""
    ends = [[3, 4, 11, 40, 41], [8, 16, 32, 56], [], [60]]
    ids = [np.searchsorted(np.array(e), np.arange(T), side="right") for e in ends]
    return np.stack(ids).astype(np.int32)


def _arranged(x, variant: str, n: int) -> np.ndarray:
    if not context_parallelism.is_zigzag(variant):
        return np.asarray(x)
    chunks = np.split(np.asarray(x), 2 * n, axis=1)
    return np.concatenate([chunks[c] for c in ring.chunk_order(n)], axis=1)


def _with_gradients(variant: str | None, layout: sharding.Layout | None):
    def run(q, k, v, do, ids):
        attend = functools.partial(
            api.attention,
            mask=api.Mask(segment_ids_BT=ids),
            implementation="reference",
            context_parallel=variant,
            layout=layout,
        )
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    return run


@functools.cache
def _program(variant: str, text: str, *, packed: bool, K: int = K, devices: int = 8):
    layout = _layout(text, num_devices=devices)
    spec = functools.partial(sharding.sharding, layout=layout)
    heads, kv = (spec(("batch", "length", f"act_{x}", None)) for x in ("heads", "kv_heads"))
    ids = _segments() if packed else None
    step = jax.jit(
        _with_gradients(variant, layout),
        in_shardings=(heads, kv, kv, heads, spec(("batch", "length")) if packed else None),
        out_shardings=(heads, heads, kv, kv),
    )
    return hlo.compile_and_read(step.lower(*_inputs(K), ids), layout.mesh)


def _moves(program: hlo.Program) -> Counter:
    """(once or looped, kind) -> number of instructions over `context`; there may be no others."""
    assert {c.axes for c in program.collectives} == {("context",)}
    return Counter(("looped" if c.looped else "once", c.kind) for c in program.collectives)


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("variant", "text", "packed", "K"),
    [
        ("ring", "context=8", True, 8),
        _slow("ring", "context=8", False, 2),
        _slow("ring", "context=4,tensor=2", False, 2),
        _slow("ring", "context=4,tensor=2", True, 2),
        _slow("ring", "context=2,tensor=4,kv_heads=replicated", True, 2),
        ("ring", "context=2,data=2,fsdp=2", True, 2),
        ("all_gather", "context=4,tensor=2", True, 2),
        _slow("all_gather", "context=8", True, 8),
        _slow("all_gather", "context=2,data=2,fsdp=2", False, 2),
        ("ulysses", "context=2,data=2,tensor=2", True, 4),
        _slow("ulysses", "context=8", True, 8),
        _slow("ulysses", "context=4,tensor=2", False, 8),
    ],
)
def test_values_and_gradients_equal_one_device(variant, text, packed, K):
    ids = _segments() if packed else None
    want = jax.jit(_with_gradients(None, None))(*_inputs(K), ids)
    n = _layout(text).size("length")
    arranged = functools.partial(_arranged, variant=variant, n=n)
    inputs = [arranged(x) for x in (*_inputs(K), *([ids] if packed else []))]
    program = _program(variant, text, packed=packed, K=K)
    got = program.run(*inputs, *([] if packed else [None]))
    for ours, theirs in zip(got, want, strict=True):
        gap = np.linalg.norm(np.asarray(ours) - arranged(theirs)) / np.linalg.norm(theirs)
        assert gap < 1e-6


def test_exactly_the_expected_collectives():
    assert _moves(_program("ring", "context=8", packed=True, K=8)) == {
        ("once", "collective-permute"): 3 + 3 + 3 + 2 + 2,
        ("looped", "collective-permute"): 3 + 3 + 2,
    }
    assert _moves(_program("all_gather", "context=4,tensor=2", packed=True, K=2)) == {
        ("once", "all-gather"): 3 + 3,
        ("once", "reduce-scatter"): 2,
    }
    assert _moves(_program("ulysses", "context=2,data=2,tensor=2", packed=True, K=4)) == {
        ("once", "all-to-all"): 4 + 4,
        ("once", "all-gather"): 1,
    }


def test_memory_of_a_device_falls_as_one_over_their_number():
    """Lengths are so short that queries outweigh a block's scores: nothing is larger than they."""
    for n in (2, 8):
        program = _program("ring", f"context={n}", packed=False, K=2, devices=n)
        queries = B * T * N * H // n
        assert program.largest == queries
        memory = program.run.memory_analysis()
        whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
        whole += memory.temp_size_in_bytes
        # Measured: 12.8 and 13.1 (15.2 for 4); two devices need no loop.
        assert whole < 16 * 4 * queries


def test_zigzag_order():
    layout = _layout("context=4,data=2")
    x_BT = np.arange(B * T, dtype=np.int32).reshape(B, T)
    got = jax.jit(lambda x: context_parallelism.arrange(x, "ring", layout=layout))(x_BT)
    np.testing.assert_array_equal(got, _arranged(x_BT, "ring", 4))
    assert ring.chunk_order(4) == (0, 7, 1, 6, 2, 5, 3, 4)


@pytest.mark.parametrize(
    ("variant", "text", "remat"),
    [
        ("ring", "context=4,tensor=2", "save_attention"),
        _slow("ring", "context=8", "dots"),
        _slow("ring", "context=2,data=2,fsdp=2", "full"),
        _slow("ring", "context=2,data=2,fsdp=2", "none"),
        _slow("all_gather", "context=4,fsdp=2", "full"),
        _slow("all_gather", "context=4,fsdp=2", "minimal"),
        _slow("ulysses", "context=2,fsdp=4", "dots"),
        _slow("ulysses", "context=2,fsdp=4", "full"),
    ],
)
def test_a_model_equals_one_device(variant, text, remat):
    program = cases.program(text, context_parallel=variant, remat=remat)
    want_loss, want = cases.one_device(cases.MODEL)
    got_loss, got = program.run(cases.random_params(cases.MODEL), *cases.batch())
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        gap = np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / np.linalg.norm(theirs)
        assert gap < 1e-5


@pytest.mark.parametrize(
    ("text", "remat", "looped"),
    [
        # Forward 2 + 3, backward 6 + 9: kept o and log-sum-exp leave no forward ring in it.
        ("context=4,tensor=2", "save_attention", 20),
        _slow("context=8", "dots", 20),
        _slow("context=8", "full", 26),
    ],
)
def test_a_step_moves_what_its_mesh_explains(text, remat, looped):
    """Weights and the embedding's rows move over context as over fsdp; tokens alone are whole."""
    program = cases.program(text, context_parallel="ring", remat=remat)
    over_context = [c for c in program.collectives if c.axes == ("context",)]
    assert Counter(("looped" if c.looped else "once", c.kind) for c in over_context) == {
        ("looped", "collective-permute"): looped,
        # Into zigzag order: five arrays [B, T], two permutes each. Segment ids' first hop.
        ("once", "collective-permute"): 2 * 5 + 1,
        ("looped", "all-gather"): 7 + 7,  # a layer's matrices, forward and backward
        ("once", "all-gather"): 2,  # the output kernel, the tokens
        ("once", "all-to-all"): 2,  # the embedding's rows, and their gradients
        ("looped", "reduce-scatter"): 7,  # their gradients
        ("looped", "all-reduce"): 5,  # those of biases and norms
        ("once", "reduce-scatter"): 1,  # the output kernel's gradient
        ("once", "all-reduce"): 3,  # final norm, loss and weight
    }
    assert "rematerialization" not in program.warnings, program.warnings
    for c in program.collectives:
        share = cases.B * cases.T * cases.MODEL.hidden_size // cases.layout(text).size("length")
        assert cases.T not in c.shape or np.prod(c.shape) <= share, c


def test_bad_meshes_are_named():
    layout = _layout("context=8")
    with pytest.raises(
        ValueError, match="length 72 .* 16 chunks.*use a multiple of 16, such as 64"
    ):
        context_parallelism.choose("ring", length=72, layout=layout)
    with pytest.raises(ValueError, match="unknown context_parallel 'rings'"):
        context_parallelism.choose("rings", length=64, layout=layout)
    with pytest.raises(ValueError, match="length 60 is not divisible by context=8"):
        context_parallelism.choose("ulysses", length=60, layout=layout)
    with pytest.raises(ValueError, match="each has 2 key-value heads; use context_parallel=ring"):
        jax.eval_shape(_with_gradients("ulysses", layout), *_inputs(2), None)
    q, k, v, _ = _inputs()
    with pytest.raises(ValueError, match="ring computes causal attention with segment ids"):
        api.attention(q, k, v, mask=api.Mask(causal=False), context_parallel="ring", layout=layout)
    assert context_parallelism.choose("auto", length=8 * 2048, layout=layout) == "ring"
    assert context_parallelism.choose("auto", length=8 * 1024, layout=layout) == "all_gather"
    assert context_parallelism.choose("auto", length=64, layout=_layout("fsdp=8")) is None
