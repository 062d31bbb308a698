"""Estimates against compiled steps, small sums by hand, and what a user reads when nothing fits."""

from pathlib import Path

import pytest

from benchmarks import pods
from configs.data import DataConfig
from configs.hardware import topologies
from configs.models import presets
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from qwen_jax.analysis.plan import job, memory, search
from qwen_jax.cli import plan_command

# model, slice, mesh, tokens a row, rows, remat, peak_memory_in_bytes / 1e9 of the compiled step
# (jax 0.10.2, libtpu 0.0.42.1).
# fmt: off
COMPILED = [
    ("qwen2.5-0.5b", "v5e-16", "fsdp=-1", 4096, 1, "full", 2.312),
    ("qwen2.5-1.5b", "v5e-16", "fsdp=-1", 4096, 2, "minimal", 15.466),
    ("qwen2.5-7b", "v5p-128", "fsdp=-1", 4096, 1, "full", 5.335),
    ("qwen2.5-7b", "v5p-128", "fsdp=-1", 4096, 1, "minimal", 16.648),
    ("qwen2.5-7b", "v5e-16", "fsdp=4,tensor=4", 4096, 1, "full", 8.993),
    ("qwen2.5-7b", "v5e-16", "fsdp=4,tensor=4", 4096, 4, "full", 12.246),
    ("qwen2.5-7b", "v6e-64", "fsdp=-1", 32768, 1, "full", 17.315),
    ("qwen2.5-7b", "v5p-128", "fsdp=16,context=4", 32768, 1, "full", 7.910),
    ("qwen2.5-14b", "v6e-16", "fsdp=4,context=4", 16384, 1, "save_attention", 24.647),
    ("qwen2.5-32b", "v5p-128", "fsdp=-1", 32768, 1, "full", 43.467),
    ("qwen2.5-72b", "v5p-128", "fsdp=-1", 4096, 1, "full", 28.498),
    ("qwen2.5-72b", "v6e-256", "fsdp=-1", 4096, 1, "full", 15.244),
    ("qwen1.5-moe-a2.7b", "v5p-128", "fsdp=16,expert=4", 4096, 1, "full", 6.825),
    ("qwen1.5-moe-a2.7b", "v5e-64", "fsdp=-1", 4096, 1, "minimal", 13.607),
    ("qwen2-57b-a14b", "v6e-256", "fsdp=16,expert=16", 4096, 1, "full", 18.179),
    ("qwen2-57b-a14b", "v5p-128", "fsdp=16,expert=4", 4096, 1, "full", 21.680),
    ("qwen2.5-3b", "v5e-256", "fsdp=-1", 8192, 2, "save_attention", 11.406),
    ("qwen2.5-14b", "v5e-64", "fsdp=8,tensor=8", 4096, 2, "minimal", 16.350),
]
# fmt: on

# Every row of docs/pods.md: models and slices, all with full rematerialisation but for one.
PODS = pods.read(Path(__file__).parents[4] / "docs" / "pods.jsonl")


def _job(model, topology, mesh, *, length=4096, rows=1, remat="full", purpose="train"):
    config = TrainConfig(
        data=DataConfig(sequence_length=length), remat=remat, mesh=mesh_lib.parse(mesh)
    )
    return job.make(
        presets.preset(model), config, topologies.parse(topology), rows=rows, purpose=purpose
    )


@pytest.mark.parametrize(("model", "where", "mesh", "length", "rows", "remat", "peak"), COMPILED)
def test_the_estimate_is_near_the_compiler(model, where, mesh, length, rows, remat, peak):
    planned = _job(model, where, mesh, length=length, rows=rows, remat=remat)
    assert memory.estimate(planned).total / 1e9 == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("case", PODS, ids=repr)
def test_the_estimate_is_near_every_compiled_row_of_the_docs(case):
    compiled = PODS[case]
    estimated = memory.estimate(pods.planned(case, compiled["mesh"]))
    assert estimated.total == pytest.approx(compiled["peak"], rel=0.15)
    # All of it but the padding of a few vectors.
    assert estimated.state == pytest.approx(compiled["arguments"], abs=1e4)


@pytest.mark.parametrize(
    ("where", "mesh", "rows", "purpose", "peak"),
    [("v5e-16", "fsdp=-1", 2, "eval", 4.295), ("v5e-8", "fsdp=2,tensor=4", 64, "decode", 7.72)],
)
def test_evaluation_and_decoding_are_near_the_compiler(where, mesh, rows, purpose, peak):
    planned = _job("qwen2.5-7b", where, mesh, rows=rows, purpose=purpose)
    assert memory.estimate(planned).total / 1e9 == pytest.approx(peak, rel=0.15)


def test_state_by_hand():
    planned = _job("tiny", "cpu-4", "fsdp=4", length=256)
    held = sum(leaf.local_size for leaf in job.parameters(planned))
    one = memory.estimate(planned)
    assert one.kinds["parameters"] == 4 * held
    assert one.kinds["optimizer"] == 8 * held
    # Layers, tokens, width, bfloat16: full remat keeps each layer's input alone.
    assert one.kinds["kept"] == 4 * 256 * 128 * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"topology": "v5q-128"}, "topology='v5q-128' is unknown"),
        ({"model": "qwen9"}, "unknown model 'qwen9'"),
        ({"mesh": "fsdp=8,tensor=8"}, "does not lie on v5p-128.*1, 4, 16, 64"),
        ({"mesh": "fsdp=4,tensor=4"}, "needs a total of 16 devices"),
        ({"remat": "huh"}, "unknown remat policy 'huh'"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"model": None}, "plan needs --model or --recipe"),
        (
            {"model": "qwen2.5-72b", "topology": "v6e-16", "rows": 1},
            r"does not fit v6e-16: the least need is .* the limit is 28.1 GiB.*v6e-\d+ fits",
        ),
    ],
)
def test_bad_input_is_one_clear_error(flags, message):
    asked = {
        "model": "qwen2.5-7b", "recipe": None, "topology": "v5p-128", "mesh": "", "length": None,
        "rows": None, "batch": None, "remat": None, "purpose": "train", **flags,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        plan_command.run(plan_command.Request(**asked), picture=None)


def test_the_recommendation_fits_and_is_the_fastest():
    cfg, where = presets.preset("qwen2.5-7b"), topologies.parse("v5e-64")
    found, refused = search.candidates(cfg, TrainConfig(), where)
    best = search.recommend(found, refused)
    assert best.fits()
    assert best.speed == pytest.approx(max(one.speed for one in found if one.fits()), abs=1e-3)
