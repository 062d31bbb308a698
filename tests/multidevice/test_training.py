"""Loss and gradients on eight devices: the numbers of one device, by the expected collectives.

The expected ones, for L layers of 12 tensors each (5 biases and norm scales, 7 matrices), with
every layer recomputed in the backward pass:

data    one all-reduce per gradient: 12 a layer in the backward loop; embedding, final norm and
        output kernel after it; two more for the sums of loss and weight.
fsdp    a layer's 7 matrices are gathered in the forward loop and again in the backward one, the
        output kernel once before the loss's loop. The gradients of matrices are reduce-scattered
        under `shard_map`, those of biases and norms all-reduced. The embedding's columns stay where
        they are: the group's token ids are gathered, and rows of activations go to their sequences,
        and their gradients back, by one all-to-all each.
        With `data` beside it, only the slices of matrices' gradients are reduced over it.
tensor  two all-reduces of activations a layer (after attention, after the MLP) and one after the
        embedding. Backward: the one after attention again, for recomputation; then the gradients
        of the inputs of gate, up, q, k and v (TPU and GPU add before they reduce: two). In the
        loss's loop: the sum of exponentials, the gradient of the hidden states; and the two maxima,
        which one reduction finds, so that XLA gathers each device's [B, chunk] and finishes them.
kv_heads=replicated  as tensor, except that k and v enter every device: their gradients are
        summed over the heads that share them and gathered over the rest, rather than reduced.
"""

from collections import Counter

import jax
import numpy as np
import pytest

from partitioning import rules, sharding
from qwen_jax.model import transformer
from tests.multidevice import cases, hlo

DATA = {
    ("model'", "looped", "all-reduce", "data"): 12,
    ("model'", "once", "all-reduce", "data"): 2,  # embedding, final norm
    ("", "once", "all-reduce", "data"): 1,  # output kernel
    ("loss", "once", "all-reduce", "data"): 2,  # loss, weight
}
FSDP_MOVES = {
    ("model", "looped", "all-gather", "fsdp"): 7,
    ("model'", "looped", "all-gather", "fsdp"): 7,
    ("loss", "once", "all-gather", "fsdp"): 1,
    ("model", "once", "all-gather", "fsdp"): 1,  # token ids
    ("model", "once", "all-to-all", "fsdp"): 1,
    ("model'", "once", "all-to-all", "fsdp"): 1,
}
FSDP = FSDP_MOVES | {
    ("", "looped", "reduce-scatter", "fsdp"): 7,
    ("", "once", "reduce-scatter", "fsdp"): 1,  # output kernel
    ("model'", "looped", "all-reduce", "fsdp"): 5,  # biases and norms are whole everywhere
    ("model'", "once", "all-reduce", "fsdp"): 1,  # final norm; the embedding's needs none
    ("loss", "once", "all-reduce", "fsdp"): 2,
}
DATA_AND_FSDP = FSDP_MOVES | {
    ("", "looped", "reduce-scatter", "fsdp"): 7,
    ("", "looped", "all-reduce", "data"): 7,
    ("", "once", "reduce-scatter", "fsdp"): 1,
    ("", "once", "all-reduce", "data"): 1,
    ("model'", "looped", "all-reduce", "data+fsdp"): 5,
    ("model'", "once", "all-reduce", "data"): 1,  # embedding
    ("model'", "once", "all-reduce", "data+fsdp"): 1,  # final norm
    ("loss", "once", "all-reduce", "data+fsdp"): 2,
}
TENSOR = {
    ("model", "once", "all-reduce", "tensor"): 1,
    ("model", "looped", "all-reduce", "tensor"): 2,
    ("model'", "looped", "all-reduce", "tensor"): 6,
    ("loss", "looped", "all-reduce", "tensor"): 2,
    ("loss", "looped", "all-gather", "tensor"): 2,
}
TENSOR_KV_REPLICATED = TENSOR | {
    # attention again, gate, up, q; dk and dv over the devices that share a key-value head ...
    ("model'", "looped", "all-reduce", "tensor"): 6,
    # ... and from the devices that have the others.
    ("model'", "looped", "all-gather", "tensor"): 2,
}

EXPECTED = {
    ("data=8", cases.MODEL): DATA,
    ("fsdp=8", cases.MODEL): FSDP,
    ("data=2,fsdp=4", cases.MODEL): DATA_AND_FSDP,
    ("data=2,tensor=4", cases.MODEL): DATA | TENSOR,
    ("fsdp=4,tensor=2", cases.TIED): FSDP | TENSOR,
    ("data=2,fsdp=2,tensor=2", cases.MODEL): DATA_AND_FSDP | TENSOR,
    ("tensor=8,kv_heads=replicated", cases.FEW_KV_HEADS): TENSOR_KV_REPLICATED,
    ("data=2,tensor=4,kv_heads=replicated", cases.FEW_KV_HEADS): DATA | TENSOR_KV_REPLICATED,
}
SELDOM = ("data=2,fsdp=4", "data=2,tensor=4,kv_heads=replicated")  # the others cover their parts
MESHES = pytest.mark.parametrize(
    ("mesh", "cfg"),
    [
        pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (case[0] in SELDOM))
        for case in EXPECTED
    ],
)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@MESHES
def test_same_loss_and_gradients_as_one_device(mesh, cfg):
    _assert_same(cases.program(mesh, cfg=cfg), cfg)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert=2,fsdp=4", "context=2,fsdp=2,tensor=2"])
def test_same_numbers_on_axes_that_dense_models_seldom_use(mesh):
    _assert_same(cases.program(mesh), cases.MODEL)


@pytest.mark.slow
def test_same_numbers_with_unrolled_layers():
    _assert_same(cases.program("data=2,fsdp=2,tensor=2", layer_loop="unrolled"), cases.MODEL)


@MESHES
def test_exactly_the_expected_collectives(mesh, cfg):
    program = cases.program(mesh, cfg=cfg)
    assert program.count() == Counter(EXPECTED[mesh, cfg])
    assert "rematerialization" not in program.warnings, program.warnings


@MESHES
def test_nothing_is_as_large_as_the_logits(mesh, cfg):
    layout = cases.layout(mesh)
    logits = cases.B * cases.T * cfg.vocab_size // layout.mesh.size
    program = cases.program(mesh, cfg=cfg)
    assert layout.size("batch") * layout.size("vocab") == layout.mesh.size
    assert program.largest < logits, "one device's share of [batch, length, vocab]"
    for collective in program.collectives:
        assert np.prod(collective.shape) <= cfg.hidden_size * cfg.vocab_size, collective
        is_activation = cases.T in collective.shape and collective.dtype != "s32"
        if collective.kind == "all-gather" and is_activation:
            assert layout.size("kv_heads") < layout.size("heads"), collective


def test_bfloat16_moves_as_bfloat16():
    """What is cast is cast before it moves. Float32 are the sums that have to be, and few rows."""
    program = cases.program("data=2,fsdp=2,tensor=2", dtype="bfloat16")
    assert program.count() == Counter(DATA_AND_FSDP | TENSOR)
    D, V = cases.MODEL.hidden_size, cases.MODEL.vocab_size
    wide = Counter((c.scope, c.kind, c.shape) for c in program.collectives if c.dtype == "f32")
    chunk = (cases.B // 4, cases.CHUNK)
    assert wide == {
        ("model", "all-reduce", (cases.B // 2, cases.T, D // 2)): 1,  # rows, before their cast
        ("model'", "all-reduce", (V // 2, D // 2)): 1,  # the embedding's gradient
        ("", "reduce-scatter", (D // 2, V // 2)): 1,  # the output kernel's
        ("", "all-reduce", (D // 2, V // 2)): 1,
        ("loss", "all-reduce", ()): 2,
        ("loss", "all-reduce", chunk): 1,  # sum of exponentials
        ("loss", "all-gather", (*chunk, 2)): 2,  # maxima
    }


def test_decoding_gathers_no_weights():
    """Rules `engine`: weights whole but for tensor's part, so only its all-reduces."""
    layout = sharding.Layout(cases.layout("fsdp=4,tensor=2").mesh, rules.ENGINE)

    def logits(params, tokens_BT):
        with jax.named_scope("model"):
            hidden_BTD = transformer.apply(cases.MODEL, params, tokens_BT, layout=layout).hidden_BTD
            return transformer.unembed(cases.MODEL, params, hidden_BTD[:, -1:])

    of_params = sharding.shardings(transformer.axes(cases.MODEL), layout)
    of_tokens = sharding.sharding(("batch", "length"), layout)
    step = jax.jit(logits, in_shardings=(of_params, of_tokens))
    tokens_BT = cases.batch()[0]
    program = hlo.compile_and_read(
        step.lower(transformer.shapes(cases.MODEL), tokens_BT), layout.mesh
    )
    assert program.count() == {
        ("model", "once", "all-reduce", "tensor"): 1,
        ("model", "looped", "all-reduce", "tensor"): 2,
    }
    params = cases.random_params(cases.MODEL)
    alone = transformer.apply(cases.MODEL, params, tokens_BT).hidden_BTD[:, -1:]
    want = np.asarray(transformer.unembed(cases.MODEL, params, alone))
    gap = np.linalg.norm(np.asarray(program.run(params, tokens_BT)) - want)
    assert gap / np.linalg.norm(want) < 1e-5


def _assert_same(program, cfg):
    want_loss, want = cases.one_device(cfg)
    got_loss, got = program.run(cases.random_params(cfg), *cases.batch())
    assert float(got_loss) == pytest.approx(float(want_loss), rel=1e-5)
    for (path, theirs), ours in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        gap = np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / np.linalg.norm(theirs)
        assert gap < 1e-5, f"{jax.tree_util.keystr(path)}: relative norm {gap:.2e}"
