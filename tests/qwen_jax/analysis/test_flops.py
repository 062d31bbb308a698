"""FLOPs against sums done by hand, and parameters against the model's own arrays."""

import math

import jax
import pytest

from configs.models import qwen2_5
from qwen_jax.analysis import flops
from qwen_jax.model import transformer


def test_matmul_parameters_of_1_5b_by_hand():
    cfg = qwen2_5.preset("qwen2.5-1.5b")
    # q and o 1536x1536, k and v 1536x256, gate, up and down 1536x8960, 28 times; 151936 columns.
    layer = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960
    assert flops.matmul_parameters(cfg) == 28 * layer + 1536 * 151936 == 1_543_569_408


def test_training_operations_of_1_5b_at_4096():
    cfg = qwen2_5.preset("qwen2.5-1.5b")
    products = 6 * 1_543_569_408
    full = 12 * 28 * 1536 * 4096
    count = flops.train_per_token
    assert count(cfg, length=4096, attention="full") == products + full
    assert count(cfg, length=4096, attention="causal") == products + full / 2
    # 38,978 tokens a second are 402 TFLOP/s with causal attention.
    assert 38_978 * count(cfg, length=4096, attention="causal") == pytest.approx(402e12, rel=1e-3)


@pytest.mark.parametrize("name", ["tiny", "tiny-untied", "qwen2.5-0.5b", "qwen2.5-7b"])
def test_parameters_are_those_of_the_arrays(name):
    cfg = qwen2_5.preset(name)
    arrays = jax.tree.leaves(transformer.shapes(cfg))
    assert flops.parameters(cfg) == sum(math.prod(array.shape) for array in arrays)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),  # one of the two devices of a chip
    ],
)
def test_peaks(kind, tera):
    assert flops.peak(kind) == tera * 1e12


def test_a_device_that_is_not_known_has_no_peak():
    assert flops.peak("cpu") is None
