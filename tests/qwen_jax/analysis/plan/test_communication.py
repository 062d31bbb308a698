"""What a step sends, summed up on paper for the model of `cases.py`; and which axes carry it."""

import dataclasses

import pytest

from configs.data import DataConfig
from configs.hardware import topologies
from configs.models import presets
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from qwen_jax.analysis.plan import communication, job
from tests.qwen_jax.analysis.plan.cases import KERNEL, LAYERS, MOE, D, L, planned


def sent(one) -> dict[tuple[str, str], float]:
    found = {}
    for transfer in communication.transfers(one):
        key = (transfer.over, transfer.reason)
        assert key not in found
        found[key] = transfer.num_bytes
    return found


def test_fsdp_by_hand():
    assert sent(planned("fsdp=4")) == {
        # Three quarters come from others, forward and again in the backward pass, 2 bytes each.
        ("fsdp", "gather weights"): 2 * 2 * LAYERS * 3 / 4,
        ("fsdp", "gather output kernel"): 2 * KERNEL * 3 / 4,
        ("fsdp", "reduce-scatter gradients"): 2 * LAYERS * 3 / 4,
        ("fsdp", "reduce-scatter the output kernel's gradient"): 4 * KERNEL * 3 / 4,
        # 512 tokens of 256, there and, as gradients, back.
        ("fsdp", "all-to-all embeddings"): 2 * 2 * 512 * D * 3 / 4,
    }


def test_evaluation_sends_weights_once_and_no_gradients():
    assert sent(planned("fsdp=4", purpose="eval")) == {
        ("fsdp", "gather weights"): 2 * LAYERS * 3 / 4,
        ("fsdp", "gather output kernel"): 2 * KERNEL * 3 / 4,
        ("fsdp", "all-to-all embeddings"): 2 * 512 * D * 3 / 4,
    }


def test_replicas_and_slices_sum_what_each_device_holds():
    # 8 devices a slice: 2 replicas of 4 parts, and the same in a second slice.
    found = sent(planned("data=2,fsdp=4", "2xv5e-8"))
    norms_and_biases = L * (2 * D + 256 + 128 + 128)
    held = 2 * (LAYERS / 4 + norms_and_biases) + 4 * KERNEL / 4
    # An all-reduce over n sends twice (n - 1) / n.
    assert found["data", "all-reduce gradients"] == 2 * held / 2
    assert found["dcn", "all-reduce gradients"] == 2 * held / 2


def test_accumulation_repeats_everything():
    once, twice = sent(planned("fsdp=4")), sent(planned("fsdp=4", accumulate_steps=2))
    assert twice == {key: 2 * num_bytes for key, num_bytes in once.items()}


@pytest.mark.parametrize(("policy", "times"), [("full", 5), ("minimal", 4)])
def test_tensor_parallel_activations_by_hand(policy, times):
    found = sent(planned("tensor=2", "cpu-2", remat=policy))
    # All-reduces of [512, 256]: two forward and two backward a layer, one more where what follows
    # attention is computed again; and the embedding's and the loss's. Each sends 2 (n - 1) / n.
    stream = 2 * 512 * D
    assert found == {("tensor", "all-reduce activations"): (times * L + 2) * 2 * stream / 2}


def test_a_ring_by_hand():
    found = sent(planned("context=4", context_parallel="ring"))
    kv = 2 * 2 * 128 * 2 * 64  # k and v, bfloat16, 128 tokens, 2 heads of 64
    # Three hops: forward, repeated, backward with float32 gradients of twice the size.
    assert found["context", "ring of keys and values"] == L * 3 * (kv + kv + 3 * kv)
    # Weights are split over the devices that share a row.
    assert found["context", "gather weights"] == 2 * 2 * LAYERS * 3 / 4
    kept = sent(planned("context=4", context_parallel="ring", remat="save_attention"))
    assert kept["context", "ring of keys and values"] == L * 3 * (kv + 3 * kv)


def test_ulysses_by_hand():
    found = sent(planned("context=2", "cpu-2", context_parallel="ulysses"))
    kv, q = 2 * 2 * 256 * 2 * 64, 2 * 256 * 4 * 64
    # q, k, v there and o back, half of each to the other; forward, repeated, backward.
    assert found["context", "all-to-all heads"] == L * 3 * (kv + 2 * q) / 2


def test_tokens_go_to_their_experts_and_back_by_hand():
    found = sent(planned("fsdp=2,expert=2", "cpu-4", cfg=MOE))
    row = 2 * 512 * D
    # Gathered and scattered, forward and backward, and gathered once more: 5 ways to one other.
    assert found["expert", "gather and scatter tokens"] == L * 5 * row
    kept = sent(planned("fsdp=2,expert=2", "cpu-4", cfg=MOE, remat="save:expert_rows"))
    assert kept["expert", "gather and scatter tokens"] == L * 4 * row
    # Experts' matrices, half of the 8 a device, are gathered over fsdp alone; others over both.
    experts = L * 4 * 3 * D * 128
    assert found["fsdp", "gather weights of experts"] == 2 * 2 * experts / 2
    others = L * (131_072 + 65_536 + 3 * D * 512 + 8 * D)  # attention, shared expert, router
    assert found["fsdp*expert", "gather weights"] == 2 * 2 * others * 3 / 4


def test_a_capacity_sends_places_by_all_to_all():
    moe = dataclasses.replace(MOE.moe, capacity_factor=1.5)
    one = planned("expert=4", "cpu-4", cfg=dataclasses.replace(MOE, moe=moe))
    row = 2 * 512 * D
    # 2 choices of 1.5 places each, three quarters of them elsewhere.
    assert sent(one)["expert", "all-to-all tokens"] == L * 5 * 3 * row * 3 / 4


def test_decoding_gathers_no_weights():
    assert sent(planned("fsdp=4", purpose="decode")) == {}
    found = sent(planned("tensor=2", "cpu-2", purpose="decode"))
    assert found == {
        ("tensor", "all-reduce activations"): (2 * L + 2) * 2 * (2 * D) / 2,
        ("tensor", "gather logits"): 4 * 1024 / 2,
    }


def test_bytes_add_up_by_axes():
    found = communication.transfers(planned("fsdp=2,context=2", "cpu-4"))
    total = communication.by_axes(found)
    assert set(total) == {"fsdp*context", "fsdp", "context"}
    assert sum(total.values()) == sum(transfer.num_bytes for transfer in found)


# Bytes in results of all-gathers and collective-permutes of compiled steps, / 1e9, of one row a
# device (jax 0.10.2, libtpu 0.0.42.1; full remat).
@pytest.mark.parametrize(
    ("mesh", "length", "gathered", "permuted"),
    [
        ("fsdp=64", 4096, 28.01, None),
        ("fsdp=16,context=4", 32768, 28.12, 7.05),
    ],
)
def test_a_7b_step_on_v5p_moves_what_the_compiler_moves(mesh, length, gathered, permuted):
    config = TrainConfig(data=DataConfig(sequence_length=length), mesh=mesh_lib.parse(mesh))
    config = dataclasses.replace(config, remat="full")
    one = job.make(presets.preset("qwen2.5-7b"), config, topologies.parse("v5p-128"), rows=1)
    found = {reason: num_bytes / 1e9 for (_, reason), num_bytes in sent(one).items()}
    weights = found["gather weights"] + found["gather output kernel"]
    # The compiler gathers a few of them a third time, for what the backward pass repeats.
    assert weights == pytest.approx(gathered, rel=0.05)
    if permuted is not None:
        assert found["ring of keys and values"] == pytest.approx(permuted, rel=0.01)


def test_a_decoded_token_moves_what_the_compiler_moves():
    # Compiled for v5e-8, 64 slots of a 7B: for 8 tokens 456 all-reduces, with results of 0.21 GB,
    # and 8 all-gathers, 0.31 GB.
    config = TrainConfig(mesh=mesh_lib.parse("fsdp=2,tensor=4"))
    where = topologies.parse("v5e-8")
    one = job.make(presets.preset("qwen2.5-7b"), config, where, rows=64, purpose="decode")
    found = {reason: num_bytes / 1e6 for (_, reason), num_bytes in sent(one).items()}
    assert found["all-reduce activations"] == pytest.approx(2 * 210 / 8 * 3 / 4, rel=0.02)
    assert found["gather logits"] == pytest.approx(310 / 8 * 3 / 4, rel=0.02)
