"""The table against layouts written out by hand, and its copies against numpy's."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.models import qwen2_5, qwen2_moe
from configs.models.architecture import ModelConfig, MoEConfig
from qwen_jax.checkpoint import tensor_table

MODEL = ModelConfig(
    name="m", vocab_size=11, hidden_size=10, intermediate_size=7, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=3, head_dim=4, max_position_embeddings=8,
    bos_token_id=0, eos_token_ids=(), pad_token_id=None,
)  # fmt: skip
SPARSE = dataclasses.replace(
    MODEL,
    num_hidden_layers=3,
    moe=MoEConfig(
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=3,
        shared_expert_intermediate_size=9,
        mlp_only_layers=(1,),
        pad_experts_to=8,
    ),
)
SIZE = tensor_table.sizes(SPARSE)
N, K, H, D = 6, 3, 4, 10

# our layout from Hugging Face's, in plain numpy
EXPECTED = {
    "embed.weight": lambda w: w,
    "layers.input_norm.scale": lambda w: w,
    "layers.attention.q.kernel": lambda w: w.T.reshape(D, N, H),
    "layers.attention.q.bias": lambda w: w.reshape(N, H),
    "layers.attention.k.kernel": lambda w: w.T.reshape(D, K, H),
    "layers.attention.k.bias": lambda w: w.reshape(K, H),
    "layers.attention.v.kernel": lambda w: w.T.reshape(D, K, H),
    "layers.attention.v.bias": lambda w: w.reshape(K, H),
    "layers.attention.o.kernel": lambda w: w.T.reshape(N, H, D),
    "layers.post_attention_norm.scale": lambda w: w,
    "layers.mlp.gate.kernel": lambda w: w.T,
    "layers.mlp.up.kernel": lambda w: w.T,
    "layers.mlp.down.kernel": lambda w: w.T,
    "layers.moe.router.kernel": lambda w: w.T,
    "layers.moe.experts.gate.kernel": lambda w: w.T,
    "layers.moe.experts.up.kernel": lambda w: w.T,
    "layers.moe.experts.down.kernel": lambda w: w.T,
    "layers.moe.shared.gate.kernel": lambda w: w.T,
    "layers.moe.shared.up.kernel": lambda w: w.T,
    "layers.moe.shared.down.kernel": lambda w: w.T,
    "layers.moe.shared_gate.kernel": lambda w: w.T,
    "norm.scale": lambda w: w,
    "lm_head.kernel": lambda w: w.T,
}
ROWS = [
    *tensor_table.rows(MODEL)[:-2],
    *[r for r in tensor_table.rows(SPARSE) if ".moe." in r.path],
]
ROWS += tensor_table.rows(MODEL)[-2:]


def hf_tensor(row):
    shape = tensor_table.hf_shape(row, SPARSE)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_every_row_is_expected():
    assert [row.path for row in ROWS] == list(EXPECTED)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.path)
def test_layout(row):
    tensor = hf_tensor(row)
    ours = tensor_table.read_region(
        row, tensor_table.whole(row, SIZE), SIZE, lambda slices: tensor[slices]
    )
    expected = EXPECTED[row.path](tensor)
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(tensor_table.copy_blocked(ours), expected)
    assert tensor_table.shape(row, SPARSE)[len(row.stack) :] == expected.shape
    back = np.zeros_like(tensor)
    tensor_table.write_region(row, tensor_table.whole(row, SIZE), SIZE, tensor=back, block=ours)
    np.testing.assert_array_equal(back, tensor)


@given(data=st.data())
def test_regions_are_slices_of_the_whole(data):
    row = data.draw(st.sampled_from(ROWS))
    region = {}
    for dim in row.dims:
        start = data.draw(st.integers(0, SIZE[dim] - 1))
        region[dim] = slice(start, data.draw(st.integers(start + 1, SIZE[dim])))
    tensor = hf_tensor(row)
    ours = tensor_table.read_region(row, region, SIZE, lambda slices: tensor[slices])
    expected = EXPECTED[row.path](tensor)[tuple(region[dim] for dim in row.dims)]
    np.testing.assert_array_equal(ours, expected)
    back = np.zeros_like(tensor)
    tensor_table.write_region(row, region, SIZE, tensor=back, block=ours)
    np.testing.assert_array_equal(
        EXPECTED[row.path](back)[tuple(region[dim] for dim in row.dims)], expected
    )
    assert np.count_nonzero(back) == np.count_nonzero(expected)


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtype=st.sampled_from([np.float32, np.float16]),
    data=st.data(),
)
def test_blocked_copy_is_a_copy(shape, dtype, data):
    order = data.draw(st.permutations(range(len(shape))))
    view = (np.arange(np.prod(shape)) % 1000).astype(dtype).reshape(shape).transpose(order)
    copy = tensor_table.copy_blocked(view)
    assert copy.flags.c_contiguous
    assert copy.dtype == view.dtype
    np.testing.assert_array_equal(copy, view)


def test_parameters_add_up():
    # 494,032,768 is what transformers' num_parameters() says of Qwen2.5-0.5B.
    model = qwen2_5.base("0.5b")
    assert (
        sum(int(np.prod(tensor_table.shape(row, model))) for row in tensor_table.rows(model))
        == 494032768
    )


def test_nest_and_flatten_are_inverse():
    flat = {row.path: i for i, row in enumerate(ROWS)}
    tree = tensor_table.nest(flat)
    assert tree["layers"]["attention"]["q"]["kernel"] == 2
    assert tensor_table.flatten(tree) == flat


def test_tensors_of_a_stack_by_layer_and_expert():
    rows = {row.path: row for row in tensor_table.rows(SPARSE)}
    gate = rows["layers.moe.experts.gate.kernel"]
    assert tensor_table.shape(gate, SPARSE) == (2, 8, 10, 3)
    # The second layer of the stack is the model's third; its sixth expert pads.
    name = "model.layers.2.mlp.experts.4.gate_proj.weight"
    assert tensor_table.hf_name(gate, SPARSE, (1, 4)) == name
    assert tensor_table.hf_name(gate, SPARSE, (1, 5)) is None
    dense = rows["dense_layers.mlp.up.kernel"]
    assert tensor_table.hf_name(dense, SPARSE, (0,)) == "model.layers.1.mlp.up_proj.weight"
    assert "layers.mlp.up.kernel" not in rows
    assert len(tensor_table.hf_names(SPARSE)) == 3 + 3 * 9 + 3 + 2 * (1 + 3 * 5 + 4)


def test_published_models_have_the_tensors_of_their_files():
    # 24 layers of 9 for norms and attention, 60 x 3 for experts, 5 beside them; three outside.
    assert len(tensor_table.hf_names(qwen2_moe.a2_7b())) == 24 * (9 + 180 + 5) + 3
    assert len(tensor_table.hf_names(qwen2_moe.a14b())) == 28 * (9 + 192 + 5) + 3
