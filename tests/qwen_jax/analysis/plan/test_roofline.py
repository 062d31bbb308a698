"""Times of a step against sums on paper, for the model of `cases.py` on a v5e-4.

One row of 512 tokens a device, fsdp=4, full remat. A v5e chip does 197e12 operations a second, its
memory moves 819e9 bytes and a link 45e9 each way; the four chips are 2 x 2 without rings, so fsdp
has two links.
"""

import dataclasses

import pytest

from configs.data import DataConfig
from configs.hardware import topologies
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from qwen_jax.analysis.plan import job, roofline
from tests.qwen_jax.analysis.plan.cases import CFG, KERNEL, LAYERS, D, L, planned

M = 512
# A token's operations: 6 for every parameter of a product, and three times 2 L N H T of attention.
USEFUL = 6 * (LAYERS + KERNEL) + 3 * (2 * L * 256 * 512)
# Repeated: all but the down projection, forward once more.
REPEATED = L * (2 * D * 256 + 2 * 2 * D * 128 + 2 * 256 * 512 + 2 * 256 * D + 2 * 2 * D * 512)
HIDDEN = 2 * 2 * LAYERS * 3 / 4
EXPOSED = (2 * KERNEL + 2 * LAYERS + 4 * KERNEL + 2 * 2 * M * D) * 3 / 4


def test_a_training_step_by_hand():
    step = roofline.estimate(planned("fsdp=4"))
    assert step.flops == M * (USEFUL + REPEATED)
    assert step.repeated == M * REPEATED
    assert step.tokens == 4 * M
    # Matrices are split in four; biases (256 + 128 + 128 a layer) and norms (2 D a layer, D) whole.
    whole = L * (512 + 2 * D) + D
    held = (LAYERS + 2 * KERNEL) / 4 + whole
    gathered = LAYERS + 2 * KERNEL + whole
    # State in float32, read and written; gradients written and read; the copy in bfloat16.
    traffic = (2 * 12 + 4 + 2) * held
    # Gathered weights and their way back, each layer's input, four passes over float32 logits.
    traffic += 8 * gathered + 2 * (2 * L * M * D) + 4 * 4 * M * 1024
    assert step.hbm_bytes == traffic
    assert step.seconds == pytest.approx(
        {
            "compute": M * (USEFUL + REPEATED) / 197e12,
            "HBM": traffic / 819e9,
            "hidden transfers": HIDDEN / 90e9,
            "exposed transfers": EXPOSED / 90e9,
        }
    )
    # Of these, HBM takes 44 us, compute 33, hidden transfers 39, exposed ones 37.
    assert step.binds == "HBM"
    assert step.step_seconds == pytest.approx(traffic / 819e9 + EXPOSED / 90e9)
    assert step.tokens_per_second == pytest.approx(4 * M / step.step_seconds)
    assert step.mfu_causal == pytest.approx(M * USEFUL / (197e12 * step.step_seconds))


def test_a_policy_repeats_what_it_does_not_keep():
    repeated = {
        policy: roofline.estimate(planned("fsdp=4", remat=policy)).repeated
        for policy in ("none", "dots", "minimal", "save_all_but_mlp", "save_attention", "full")
    }
    assert repeated["none"] == repeated["dots"] == repeated["minimal"] == 0
    assert repeated["save_all_but_mlp"] == M * L * 2 * 2 * D * 512  # gate and up
    assert repeated["save_attention"] - repeated["save_all_but_mlp"] == M * L * 2 * 256 * D  # o
    assert repeated["full"] == M * REPEATED


def test_a_decoded_token_reads_weights_and_cache():
    one = planned("data=4", purpose="decode")
    step = roofline.estimate(one)
    parameters = LAYERS + 2 * KERNEL + L * (512 + 2 * D) + D
    cache = 2 * L * 512 * 2 * 64
    assert step.hbm_bytes == 2 * (parameters + cache)
    assert step.tokens == 4 and step.binds == "HBM"
    # 2 for every parameter of a product; against the whole cache, 4 L N H T.
    assert step.flops == 2 * (LAYERS + KERNEL) + 4 * L * 256 * 512


@pytest.mark.parametrize(
    ("topology", "mesh", "axes", "links", "expected"),
    [
        ("v5e-4", "fsdp=4", ("fsdp",), "all", 2 * 45e9),  # two sides of 2, one link each
        ("v5e-4", "fsdp=2,tensor=2", ("fsdp",), "all", 45e9),
        ("v5e-4", "fsdp=2,tensor=2", ("fsdp", "tensor"), "all", 2 * 45e9),
        ("v5e-256", "fsdp=16,context=16", ("context",), "all", 2 * 45e9),  # a closed ring of 16
        ("v5e-256", "fsdp=16,context=16", ("context",), "one", 45e9),  # a hop: one way round
        ("v5e-64", "fsdp=8,context=8", ("context",), "all", 45e9),  # sides of 8 are not closed
        ("v5p-128", "fsdp=64", ("fsdp",), "all", 6 * 90e9),  # three rings of 4
        ("v5p-128", "fsdp=16,tensor=4", ("tensor",), "all", 2 * 90e9),
        ("2xv5e-256", "fsdp=256", ("dcn",), "all", 12.5e9 / 4),  # a machine's, between four chips
        ("tpu7x-8", "fsdp=8", ("fsdp",), "all", 3 * 90e9 / 2),  # 2x2 and the chip's two devices
        ("h100-8", "fsdp=8", ("fsdp",), "all", 450e9),
        ("4xh100-8", "fsdp=8,dcn_data=4", ("dcn",), "all", 400e9 / 8),
        ("4xh100-8", "fsdp=8,dcn_data=4", ("fsdp",), "all", 450e9),
        # Over hosts: fsdp's neighbours are four apart, so that it spans them; tensor does not.
        ("4xh100-8", "fsdp=8,tensor=4", ("fsdp",), "all", 400e9 / 8),
        ("4xh100-8", "fsdp=8,tensor=4", ("tensor",), "all", 450e9),
    ],
)
def test_bandwidth_follows_the_sides_that_an_axis_takes(topology, mesh, axes, links, expected):
    config = TrainConfig(data=DataConfig(sequence_length=512), mesh=mesh_lib.parse(mesh))
    cfg = dataclasses.replace(CFG, num_attention_heads=16, num_key_value_heads=16)
    one = job.make(cfg, config, topologies.parse(topology), rows=1)
    assert roofline.bandwidth(one, axes, links=links) == pytest.approx(expected)


def test_a_device_without_a_data_sheet_has_no_time():
    step = roofline.estimate(planned("fsdp=4", "cpu-4"))
    assert step.step_seconds is None and step.mfu_causal is None and step.seconds == {}
    assert step.binds == "not known: the device has no data sheet"
    assert step.flops == M * (USEFUL + REPEATED)
