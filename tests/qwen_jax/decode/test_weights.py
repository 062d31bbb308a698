"""Parameters for decoding: their forms, their dtypes, and what is left of the old arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import qwen2_5, qwen2_moe
from partitioning import mesh, rules, sharding
from qwen_jax.checkpoint.quantised import quantised_params
from qwen_jax.decode import weights
from qwen_jax.model import stack, transformer
from qwen_jax.quant import array

SMALL = dataclasses.replace(qwen2_5.tiny(), num_hidden_layers=3)
# Experts in every second layer: two stacks.
MIXED = dataclasses.replace(
    qwen2_moe.tiny(),
    num_hidden_layers=3,
    moe=dataclasses.replace(qwen2_moe.tiny().moe, decoder_sparse_step=2, mlp_only_layers=()),
)


def test_prepare_consumes_and_refuses():
    params = transformer.init(SMALL, jax.random.key(0))
    embed, kernel = params["embed"]["weight"], params["layers"]["mlp"]["gate"]["kernel"]
    result = weights.prepare(SMALL, params, dtype=jnp.bfloat16, form="fused")
    assert kernel.is_deleted() and embed.is_deleted()
    assert {x.dtype for x in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}
    assert result.form == "fused" and len(result.layers) == SMALL.num_hidden_layers
    again = transformer.init(SMALL, jax.random.key(0))
    with pytest.raises(
        ValueError, match="unknown form 'stacked'; known: unstacked, fused, output_major, packed"
    ):
        weights.prepare(SMALL, again, dtype=jnp.float32, form="stacked")


def test_routers_stay_in_float32():
    params = transformer.init(MIXED, jax.random.key(0))
    prepared = weights.prepare(MIXED, params, dtype=jnp.bfloat16)
    sparse = prepared.layers[1]["moe"]
    assert sparse["router"]["kernel"].dtype == jnp.float32
    assert sparse["experts"]["up"]["kernel"].dtype == jnp.bfloat16
    assert "mlp" in prepared.layers[0] and "mlp" in prepared.layers[2]


def _unpacked(q: array.QuantArray) -> np.ndarray:
    """The matrix [O, C] that packed words stand for, in float32, read byte by byte.

    The words of a tile of outputs lie as a warp reads them: blocks of inputs, in each the 32
    threads 4 g + q, of each four words. A byte of a word is an input of output g, and in int4 its
    upper half the same input of output g + 8. Bytes 0 and 2 are neighbouring inputs, and 1 and 3
    the two after them.
    """
    tile = {"int8": 8, "int4": 16}[q.format]
    num_outputs = int(np.prod(q.outputs))
    words = np.asarray(q.values).reshape(num_outputs // tile, -1, 32, 4)
    values = np.full((num_outputs // tile, tile, words.shape[1], 64), 999, np.int64)
    for thread, word, byte in np.ndindex(32, 4, 4):
        output, quarter = divmod(thread, 4)
        at = 16 * quarter + 4 * word + {0: 0, 2: 1, 1: 2, 3: 3}[byte]
        bits = (words[:, :, thread, word].astype(np.int64) >> (8 * byte)) & 0xFF
        if q.format == "int8":
            values[:, output, :, at] = bits - 128
        else:
            values[:, output, :, at] = (bits & 0xF) - 8
            values[:, output + 8, :, at] = (bits >> 4) - 8
    assert values.max() < 999
    scales = np.asarray(q.scales, np.float32).reshape(num_outputs, -1)
    values = values.reshape(num_outputs, -1).astype(np.float32)
    return values * np.repeat(scales, q.group_size, axis=1)


def _fused_matrices(cfg, layer: dict) -> dict[str, np.ndarray]:
    """The fused matrices [O, C] of a layer's own kernels, dequantised before they are joined."""
    K, G, H = cfg.num_key_value_heads, cfg.num_query_groups, cfg.head_dim

    def plain(part: dict, name: str) -> np.ndarray:
        return np.asarray(array.dequantise(part[name]["kernel"], dtype=jnp.float32))

    attention = layer["attention"]
    q, k, v = (plain(attention, name).reshape(cfg.hidden_size, K, -1, H) for name in "qkv")
    assert q.shape[2] == G
    qkv = np.concatenate([q, k, v], axis=2)
    found = {"qkv": qkv.reshape(cfg.hidden_size, -1).T, "o": plain(attention, "o").T}
    mlp = layer["mlp"] if "mlp" in layer else layer["moe"]["shared"]
    gate_up = np.concatenate([plain(mlp, name) for name in ("gate", "up")], axis=1)
    return {**found, "gate_up": gate_up.T, "down": plain(mlp, "down").T}


@pytest.mark.parametrize(
    ("cfg", "settings"),
    [
        (SMALL, quantised_params.Settings()),
        (SMALL, quantised_params.Settings(weights="int4", group_size=64)),
        (MIXED, quantised_params.Settings()),
    ],
    ids=["dense int8", "dense int4", "experts int8"],
)
def test_packed_words_are_the_fused_matrices(cfg, settings):
    def quantised() -> dict:
        params = transformer.init(cfg, jax.random.key(0))
        return quantised_params.quantise(cfg, params, settings)

    packed = weights.prepare(cfg, quantised(), dtype=jnp.bfloat16, form="packed")
    stacked = quantised()
    layers = stack.in_order(
        cfg,
        stacked,
        lambda part: [jax.tree.map(lambda x, i=i: x[i], part) for i in range(_count(part))],
    )
    compared = []
    for made, layer in zip(packed.layers, layers, strict=True):
        mlp = made["mlp"] if "mlp" in made else made["moe"]["shared"]
        kernels = {**made["attention"], **mlp}
        for name, want in _fused_matrices(cfg, layer).items():
            if kernels[name]["kernel"].is_words:
                np.testing.assert_array_equal(_unpacked(kernels[name]["kernel"]), want)
                compared.append(name)
    output = stacked["embed"]["weight"] if cfg.tie_word_embeddings else None
    if output is None:
        output, made = stacked["lm_head"]["kernel"], packed.params["lm_head"]["kernel"]
    else:
        made = packed.params["embed"]["weight"]
    want = np.asarray(array.dequantise(output, dtype=jnp.float32))
    np.testing.assert_array_equal(_unpacked(made), want if cfg.tie_word_embeddings else want.T)
    dense = [name for name in stack.order(cfg) if "dense" in name or cfg.moe is None]
    assert len(compared) >= 4 * len(dense)


def _count(part: dict) -> int:
    return jax.tree.leaves(part)[0].shape[0]


def test_kept_parameters_stay_and_share_nothing():
    params = transformer.init(SMALL, jax.random.key(0))
    for form in ("unstacked", "fused", "output_major"):
        for dtype in (jnp.float32, jnp.bfloat16):
            made = weights.prepare(SMALL, params, dtype=dtype, form=form, source="kept")
            assert not any(x.is_deleted() for x in jax.tree.leaves(params))
            theirs = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
            assert theirs.isdisjoint(x.unsafe_buffer_pointer() for x in jax.tree.leaves(made))


def test_new_weights_of_the_same_shapes_compile_nothing():
    """Neither their preparation nor a program that takes them."""
    read = jax.jit(
        lambda weights: sum(jnp.sum(x, dtype="float32") for x in jax.tree.leaves(weights))
    )

    def prepared_sum(params: dict) -> float:
        return float(read(weights.prepare(SMALL, params, dtype=jnp.bfloat16, form="fused")))

    first, second = (transformer.init(SMALL, jax.random.key(seed)) for seed in (0, 1))
    compiled = []

    def listener(event: str, seconds: float, **_) -> None:
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        before = prepared_sum(first)
        assert compiled  # the listener hears
        compiled.clear()
        assert prepared_sum(second) != before
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled


def test_a_form_that_this_model_or_mesh_cannot_have_is_refused():
    layout = sharding.Layout(mesh.make(mesh.parse("fsdp=1")), rules.rule_set("engine"))
    params = transformer.init(MIXED, jax.random.key(0))
    with pytest.raises(ValueError, match="'output_major' is of dense models, and .* has experts"):
        weights.prepare(MIXED, params, dtype=jnp.bfloat16, form="output_major")
    with pytest.raises(ValueError, match="'packed' lies on one device, and there is a mesh"):
        weights.prepare(MIXED, params, dtype=jnp.bfloat16, form="packed", layout=layout)


@pytest.mark.parametrize("cfg", [SMALL, MIXED], ids=["dense", "experts"])
@pytest.mark.parametrize("form", ["unstacked", "fused"])
def test_shapes_are_those_of_what_is_prepared(cfg, form):
    layout = sharding.Layout(mesh.make(mesh.parse("fsdp=1")), rules.rule_set("engine"))
    options = {"dtype": jnp.dtype("bfloat16"), "form": form, "layout": layout}
    made = weights.prepare(cfg, transformer.init(cfg, jax.random.key(0)), **options)
    told = weights.shapes(cfg, **options)
    assert jax.tree.structure(told) == jax.tree.structure(made)
    for ours, theirs in zip(jax.tree.leaves(told), jax.tree.leaves(made), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_fused_kernel_is_not_made_where_heads_lie_otherwise_than_kv_heads():
    def layout(text: str) -> sharding.Layout:
        config = mesh.parse(text)
        chosen = rules.rule_set("engine", kv_heads=config.kv_heads)
        return sharding.Layout(mesh.abstract(config), chosen)

    best = functools.partial(weights.best_form, SMALL, dtype=jnp.bfloat16)
    assert best(layout=layout("tensor=2")) == "fused"
    assert best(layout=layout("tensor=4,kv_heads=replicated")) == "unstacked"
