"""RoPE and YaRN against transformers: frequencies bit for bit, logits beyond 100,000 tokens."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import schema
from configs.models import qwen2_5
from configs.models.architecture import YarnConfig
from qwen_jax.model import rope, transformer
from tests.parity import oracle

THETAS = (1e4, 1e5, 1e6, 1e7)
HEAD_DIMS = (64, 128)
YARN = YarnConfig(factor=4.0, original_max_position_embeddings=32768)
SCALINGS = (
    None,
    YARN,
    dataclasses.replace(YARN, factor=2.5, truncate=False),
    dataclasses.replace(YARN, beta_fast=24.0, beta_slow=2.0, attention_factor=1.25),
    dataclasses.replace(YARN, factor=40.0, mscale=1.0, mscale_all_dim=0.7),
)
CASES = [
    dataclasses.replace(qwen2_5.tiny(), rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)
    for theta, head_dim, scaling in itertools.product(THETAS, HEAD_DIMS, SCALINGS)
]

# Runs apart, because torch chooses its kernels once a process.
_FREQUENCIES = """
import json, sys
from configs.models import architecture
from tests.parity import oracle
from transformers.models.qwen2 import modeling_qwen2
for line in sys.stdin:
    cfg = oracle.huggingface_config(architecture.model_from_dict(json.loads(line)))
    rope = modeling_qwen2.Qwen2RotaryEmbedding(cfg)
    print("=", json.dumps([rope.inv_freq.numpy().tobytes().hex(), rope.attention_scaling]))
"""


@pytest.fixture(scope="module")
def theirs():
    """transformers' (frequencies, attention factor) per case, with torch's scalar kernels.

    torch's AVX kernels for float32 powers round one of the 64 values at (1e6, 128) an ulp off;
    its scalar ones round every value correctly, and so the same on every machine.
    """
    done = subprocess.run(
        [sys.executable, "-c", _FREQUENCIES],
        input="\n".join(json.dumps(schema.to_dict(cfg)) for cfg in CASES),
        env=os.environ
        | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("= ")]
    return [(np.frombuffer(bytes.fromhex(bits), np.float32), factor) for bits, factor in lines]


def test_frequencies_equal_transformers_bit_for_bit(theirs):
    assert len(theirs) == len(CASES)
    for cfg, (want, want_factor) in zip(CASES, theirs, strict=True):
        got, factor = rope.frequencies(cfg)
        assert got.dtype == np.float32 and got.shape == (cfg.head_dim // 2,)
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), err_msg=str(cfg))
        assert factor == want_factor, cfg


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones():
    plain = dataclasses.replace(qwen2_5.tiny(), head_dim=128)
    stretched = dataclasses.replace(plain, rope_scaling=YARN)
    ratio = rope.frequencies(plain)[0] / rope.frequencies(stretched)[0]
    assert ratio[0] == 1.0 and ratio[-1] == 4.0
    assert np.all(np.diff(ratio) >= 0)


def test_cos_and_sin_stay_exact_at_large_angles():
    cfg = dataclasses.replace(qwen2_5.tiny(), head_dim=128, max_position_embeddings=1010000)
    positions_BT = np.array([[0, 1, 99_999, 130_000, 262_143, 1_009_999]])
    rotation = jax.jit(lambda p: rope.rotation(cfg, p))(positions_BT)
    inverse, _ = rope.frequencies(cfg)
    # The angle itself is a float32 product on both sides; only cos and sin are judged here.
    angles = (positions_BT.astype(np.float32)[:, :, None] * inverse).astype(np.float64)
    np.testing.assert_allclose(rotation.cos_BTh, np.cos(angles), atol=2e-7, rtol=0)
    np.testing.assert_allclose(rotation.sin_BTh, np.sin(angles), atol=2e-7, rtol=0)


# Rows that lie together far out, and one whose keys are up to 130,000 tokens from its queries.
POSITIONS = {
    "from 100,000": np.arange(100_000, 100_048),
    "from 130,000": np.arange(130_000, 130_048),
    "spread to 130,000": np.sort(np.random.default_rng(0).choice(130_048, 48, replace=False)),
}


@pytest.mark.parametrize("preset", ["qwen2.5-0.5b-instruct", "qwen2.5-7b-instruct"])
@pytest.mark.parametrize("scaling", [YARN, None], ids=["yarn", "plain"])
def test_logits_beyond_100_000_tokens(preset, scaling):
    cfg = dataclasses.replace(oracle.shrink(preset), rope_scaling=scaling)
    theirs = oracle.build(cfg)
    positions_BT = np.stack(list(POSITIONS.values()))
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, positions_BT.shape)
    params = oracle.params(theirs, cfg)

    @jax.jit
    def ours(params, tokens_BT, positions_BT):
        hidden_BTD = transformer.apply(cfg, params, tokens_BT, positions_BT=positions_BT).hidden_BTD
        return transformer.unembed(cfg, params, hidden_BTD)

    got = ours(params, jnp.asarray(tokens_BT), jnp.asarray(positions_BT))
    want = oracle.logits(theirs, tokens_BT, positions_BT)
    for row, name in enumerate(POSITIONS):
        norm, largest = oracle.difference(got[row], want[row])
        assert max(norm, largest) < 1e-4, f"{name}: {norm:.2e}, {largest:.2e}"
    unscaled = dataclasses.replace(cfg, rope_scaling=YARN if scaling is None else None)
    other = oracle.logits(_rebuilt(theirs, unscaled), tokens_BT, positions_BT)
    assert min(oracle.difference(other, want)) > 1e-2, "the comparison would not see YARN missing"


def _rebuilt(source, cfg):
    """The same weights under another config."""
    rebuilt = oracle.build(cfg)
    rebuilt.load_state_dict(source.state_dict())
    return rebuilt


def test_length_limit_counts_the_extension():
    cfg = dataclasses.replace(oracle.shrink("qwen2.5-7b-instruct"), max_position_embeddings=32768)
    transformer.check_length(cfg, 32768)
    with pytest.raises(ValueError, match="32769 exceeds max_position_embeddings=32768"):
        transformer.check_length(cfg, 32769)
    extended = dataclasses.replace(cfg, rope_scaling=YARN)
    transformer.check_length(extended, 131072)
    with pytest.raises(ValueError, match="131073 exceeds rope_scaling"):
        transformer.check_length(extended, 131073)
    chunked = qwen2_5.preset("qwen2.5-7b-instruct-1m")
    transformer.check_length(chunked, 262144)
    with pytest.raises(ValueError, match="chunk_size=262144"):
        transformer.check_length(chunked, 262145)
