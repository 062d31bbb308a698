"""Specs, divisibility and its remedies, and the golden table of every model on every mesh."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs.models import qwen2_5
from configs.models.architecture import ModelConfig
from partitioning import mesh, rules, sharding
from qwen_jax.model import transformer

GOLDEN = Path(__file__).parent.parent / "golden" / "shardings"
# Slices as they are bought, and one host.
TABLES = {
    "qwen2.5-0.5b": ("fsdp=8", "data=4,tensor=2"),
    "qwen2.5-1.5b": ("fsdp=8", "fsdp=4,tensor=4,kv_heads=replicated"),
    "qwen2.5-3b": ("fsdp=16",),
    "qwen2.5-7b": ("fsdp=8", "fsdp=16,tensor=4"),
    "qwen2.5-14b": ("fsdp=16,tensor=4",),
    "qwen2.5-32b": ("fsdp=32,tensor=4",),
    "qwen2.5-72b": ("fsdp=32,tensor=8", "data=2,fsdp=64,tensor=8"),
}


def _layout(text: str, purpose: str = "train") -> sharding.Layout:
    config = mesh.parse(text)
    chosen = rules.rule_set(purpose, kv_heads=config.kv_heads)
    return sharding.Layout(mesh.abstract(config), chosen)


def test_spec():
    layout = _layout("data=2,fsdp=2,tensor=2")
    spec = lambda *axes: sharding.spec(axes, layout)  # noqa: E731
    assert spec("embed", "ffn") == P("fsdp", "tensor")
    assert spec("layers", "embed", "heads", "head_dim") == P(None, "fsdp", "tensor")
    assert spec("batch", "length", "act_embed") == P(("data", "fsdp"))
    assert spec("batch", None, "act_vocab") == P(("data", "fsdp"), None, "tensor")
    assert spec("norm") == P()
    assert spec() == P()


def test_axes_of_size_one_are_left_out():
    assert sharding.spec(("batch", "act_heads"), _layout("fsdp=4")) == P("fsdp")
    assert sharding.spec(("embed", "vocab"), _layout("")) == P()


def test_two_dimensions_on_one_mesh_axis_are_both_named():
    layout = _layout("tensor=2")
    with pytest.raises(ValueError) as caught:
        sharding.spec(("heads", "ffn"), layout)
    for part in ("'heads'", "'ffn'", "'tensor'", "'train'"):
        assert part in str(caught.value)


def test_layouts_are_values_that_retrace():
    one, other = _layout("fsdp=4"), _layout("fsdp=4", "engine")
    assert one == _layout("fsdp=4") and hash(one) == hash(_layout("fsdp=4"))
    assert one != other


def test_constrain_without_a_layout_is_nothing():
    x = jnp.zeros((2, 3))
    assert sharding.constrain(x, ("batch", "embed"), None) is x


def test_check_divisible():
    layout = _layout("fsdp=4,tensor=2")
    sharding.check_divisible((8, 6), ("embed", "ffn"), layout, what="w")
    with pytest.raises(ValueError, match=r"w: dimension ffn=7 is not divisible by tensor=2; use 1"):
        sharding.check_divisible((8, 7), ("embed", "ffn"), layout, what="w")
    with pytest.raises(ValueError, match="batch=6 is not divisible by fsdp=4; use 1, 2, 3"):
        sharding.check_divisible((6,), ("batch",), layout, what="tokens")


@pytest.mark.parametrize(
    ("preset", "text", "parts"),
    [
        ("qwen2.5-0.5b", "tensor=4", ["num_attention_heads=14", "tensor=4", "use 1, 2"]),
        ("qwen2.5-7b", "tensor=8", ["num_attention_heads=28", "tensor=8; use 1, 2, 4"]),
        (
            "qwen2.5-3b",
            "tensor=4",
            ["num_key_value_heads=2", "tensor=4", "use 1, 2", "mesh.kv_heads=replicated"],
        ),
        ("qwen2.5-0.5b", "fsdp=5", ["hidden_size=896", "fsdp=5", "use 1, 2, 4"]),
        (
            "odd-vocabulary",
            "tensor=4",
            ["vocab_size=151937", "use 1,", "pad the embedding to 151940 rows"],
        ),
    ],
)
def test_a_model_that_does_not_divide_is_told_what_does(preset, text, parts):
    if preset == "odd-vocabulary":
        cfg = dataclasses.replace(qwen2_5.preset("qwen2.5-7b"), vocab_size=151937)
    else:
        cfg = qwen2_5.preset(preset)
    with pytest.raises(ValueError) as caught:
        sharding.check_model(cfg, _layout(text))
    for part in parts:
        assert part in str(caught.value)


def test_replicated_kv_heads_are_a_remedy():
    cfg = qwen2_5.preset("qwen2.5-3b")
    sharding.check_model(cfg, _layout("tensor=16,kv_heads=replicated"))


LEGAL = {"0.5b": 2, "1.5b": 2, "3b": 2, "7b": 4, "14b": 8, "32b": 8, "72b": 8}


@pytest.mark.parametrize("name", [n for n in qwen2_5.PRESETS if n.startswith("qwen2.5")])
def test_legal_tensor_sizes_are_exactly_those_that_pass(name):
    cfg = qwen2_5.preset(name)
    largest = LEGAL[name.split("-")[1]]
    legal = sharding.legal_tensor_sizes(cfg)
    assert legal == tuple(n for n in (1, 2, 4, 8) if n <= largest)
    for size in range(1, 65):
        layout = _layout(f"tensor={size}")
        if size in legal:
            sharding.check_model(cfg, layout)
        else:
            smaller = ", ".join(str(n) for n in legal if n < size)
            with pytest.raises(ValueError, match=f"tensor={size}; use {smaller}($|,)"):
                sharding.check_model(cfg, layout)


def test_every_parameter_has_a_name_per_dimension():
    for name in qwen2_5.PRESETS:
        cfg = qwen2_5.preset(name)
        axes, shapes = transformer.axes(cfg), transformer.shapes(cfg)
        ranks = jax.tree.map(len, axes, is_leaf=sharding.is_axes)
        assert ranks == jax.tree.map(lambda s: len(s.shape), shapes)


def _table(cfg: ModelConfig, layout: sharding.Layout) -> list[str]:
    rows = sharding.describe(transformer.axes(cfg), transformer.shapes(cfg), layout)
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


@pytest.mark.parametrize("preset", list(TABLES))
def test_golden_tables(preset):
    """Reviewed when they change; QWEN_JAX_UPDATE_GOLDEN=1 writes them anew."""
    cfg = qwen2_5.preset(preset)
    lines = []
    for text in TABLES[preset]:
        for purpose in ("train", "engine"):
            layout = _layout(text, purpose)
            sharding.check_model(cfg, layout)
            lines += [f"# {preset}, {text}, rules {purpose}", *_table(cfg, layout), ""]
    path = GOLDEN / f"{preset}.txt"
    if os.environ.get("QWEN_JAX_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
    assert path.read_text() == "\n".join(lines), (
        f"{path.name} differs; if that is meant, run again with QWEN_JAX_UPDATE_GOLDEN=1 and "
        f"review the difference"
    )
