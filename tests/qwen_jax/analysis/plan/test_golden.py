"""Every published model on slices small and large: whether it trains there, and how best."""

import os
from pathlib import Path

import pytest

from configs.data import DataConfig
from configs.hardware import topologies
from configs.models import presets
from configs.train import TrainConfig
from qwen_jax.analysis.plan import memory, search

GOLDEN = Path(__file__).parents[3] / "golden" / "plans"
SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
# The base model of A2.7B takes 8,192 tokens, its chat model 32,768.
MODELS = {
    **{f"qwen2.5-{size}": (f"qwen2.5-{size}",) * 2 for size in SIZES},
    "qwen1.5-moe-a2.7b": ("qwen1.5-moe-a2.7b", "qwen1.5-moe-a2.7b-chat"),
    "qwen2-57b-a14b": ("qwen2-57b-a14b",) * 2,
}
LENGTHS = (4096, 32768)
SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-128", "v6e-8", "v6e-64", "v6e-256")


def _line(name: str, length: int, slice_name: str) -> str:
    config = TrainConfig(data=DataConfig(sequence_length=length))
    where = topologies.parse(slice_name)
    found, _ = search.candidates(presets.preset(name), config, where)
    best = found[0]
    limit = memory.limit(best.job, reserve=search.RESERVE)
    used = f"{best.memory.total / 1e9:6.1f} of {limit / 1e9:.1f} GB"
    batch = best.job.config.batch_size
    how = f"{best.job.mesh_text:20} {best.policy:18} batch {batch:<5}"
    if not best.fits():
        return f"{slice_name:8} no   {used:17} {how}".rstrip()
    return f"{slice_name:8} yes  {used:17} {how} {best.step.binds}"


@pytest.mark.parametrize("model", list(MODELS))
def test_golden_plans(model):
    """Reviewed when they change; QWEN_JAX_UPDATE_GOLDEN=1 writes them anew."""
    lines = [
        "# slice, whether it fits, memory of a device at its peak and the limit, the fastest way",
        "# that fits, or the way that needs least; what binds",
    ]
    for name, length in zip(MODELS[model], LENGTHS, strict=True):
        lines += ["", f"{name}, {length:,} tokens a row"]
        lines += [_line(name, length, slice_name) for slice_name in SLICES]
    text = "\n".join(lines) + "\n"
    path = GOLDEN / f"{model}.txt"
    if os.environ.get("QWEN_JAX_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, (
        f"{path.name} differs; if that is meant, run again with QWEN_JAX_UPDATE_GOLDEN=1 and "
        f"review the difference"
    )
