"""Which ways to run are tried, which is chosen, and which slice is named instead."""

import dataclasses

import pytest

from configs.data import DataConfig
from configs.hardware import topologies
from configs.mesh import MeshConfig
from configs.models import presets
from configs.train import TrainConfig
from qwen_jax.analysis.plan import job, memory, search, tiles


def _find(model, topology, *, length=4096, **held):
    config = TrainConfig(data=DataConfig(sequence_length=length))
    return search.candidates(presets.preset(model), config, topologies.parse(topology), **held)


@pytest.mark.parametrize(
    ("topology", "count"),
    [
        ("v5e-16", 10),  # 4x4: one of four axes takes both sides, or two of them one each
        ("v5p-128", 20),  # 4x4x4: three sides to four axes, equal sides alike
        ("h100-8", 20),  # 8 = 2 2 2
        ("cpu-6", 16),  # 6 = 2 3, unlike: every owner of each
        ("cpu-1", 1),
        ("2xh100-2", 4 + 10),  # two replicas of 2, or 4 = 2 2 over both hosts
        ("2xv5e-16", 10),  # two replicas
    ],
)
def test_meshes_take_whole_sides(topology, count):
    where = topologies.parse(topology)
    found = search.meshes(presets.preset("qwen2.5-7b"), where)
    assert len(found) == count
    for mesh in found:
        job.check_torus(mesh, where)
        assert mesh.expert == 1


def test_only_experts_get_an_expert_axis():
    where = topologies.parse("v5e-16")
    assert {mesh.expert for mesh in search.meshes(presets.preset("qwen2-57b-a14b"), where)} == {
        1, 4, 16,
    }  # fmt: skip


def test_the_first_is_the_fastest_that_fits_and_the_rest_are_in_order():
    found, _ = _find("qwen2.5-7b", "v5e-64")
    best = search.recommend(found, [])
    fitting = [one for one in found if one.fits()]
    assert best is found[0] and found[: len(fitting)] == fitting
    rates = [one.speed for one in fitting]
    assert rates == pytest.approx(sorted(rates, reverse=True), abs=1e-3)
    needs = [one.memory.total for one in found[len(fitting) :]]
    assert needs == sorted(needs) and len(needs) > 10


def test_rows_stop_at_the_first_number_that_does_not_fit():
    found, _ = _find("qwen2.5-7b", "v5e-16", policy="full")
    on_fsdp = [one for one in found if one.job.mesh_text == "fsdp=16"]
    assert sorted((one.job.rows, one.fits()) for one in on_fsdp) == [
        (1, True), (2, True), (4, False),
    ]  # fmt: skip


def test_what_is_held_is_not_searched():
    mesh = MeshConfig(fsdp=4, tensor=4)
    found, refused = _find("qwen2.5-7b", "v5e-16", mesh=mesh, policy="save_qkv", rows=2)
    assert refused == []
    (one,) = found
    assert (one.job.mesh_text, one.policy, one.job.rows) == ("fsdp=4,tensor=4", "save_qkv", 2)


def test_a_batch_is_split_and_its_sums_take_memory():
    found, refused = _find("qwen2.5-7b", "v5p-128", batch=64)
    assert {one.job.config.batch_size for one in found} == {64}
    assert all(
        one.job.rows * one.job.layout.size("batch") * one.job.config.accumulate_steps == 64
        for one in found
    )
    split = next(one for one in found if one.job.config.accumulate_steps > 1)
    once = dataclasses.replace(
        split.job,
        config=dataclasses.replace(
            split.job.config,
            accumulate_steps=1,
            batch_size=64 // split.job.config.accumulate_steps,
        ),
    )
    held = sum(tiles.size(once, leaf.local) for leaf in job.parameters(once))
    more = split.memory.kinds["gradients"] - memory.estimate(once).kinds["gradients"]
    assert more == pytest.approx(4 * held)  # float32
    _, refused = _find("qwen2.5-7b", "v5p-128", batch=2)
    assert ("fsdp=64", "a batch of 2 rows does not spread over 64 part(s) of 1 row(s); use a "
            "multiple of 64, or axes that share rows (context, tensor)") in refused  # fmt: skip


def test_offload_is_planned_only_by_name():
    found, _ = _find("qwen2.5-1.5b", "v5e-4")
    assert not any(one.policy.startswith("offload") for one in found)
    (one, *_) = _find("qwen2.5-1.5b", "v5e-4", policy="offload_minimal", rows=1)[0]
    assert one.memory.host > 0


def test_more_rows_never_need_less():
    for policy in ("full", "minimal", "none"):
        needs = [
            _find("qwen1.5-moe-a2.7b", "v5e-16", mesh=MeshConfig(fsdp=16), policy=policy, rows=n)[
                0
            ][0].memory.total
            for n in (1, 2, 4)
        ]
        assert needs == sorted(needs)


def test_decoding_and_evaluation_are_planned_too():
    decoded, _ = _find("qwen2.5-7b", "v5e-4", purpose="decode")
    best = search.recommend(decoded, [])
    # Weights in bfloat16, split over `tensor` alone: decoding gathers none.
    whole = 2 * 7.6158e9 / best.job.config.mesh.tensor
    assert best.memory.kinds["parameters"] == pytest.approx(whole, rel=0.001)
    # k and v of every slot: 28 layers, 4 heads of 128, 2 bytes, 4,096 positions.
    slot = 2 * 28 * 4 * 128 * 2 * 4096 / best.job.config.mesh.tensor
    assert best.memory.kinds["cache"] == best.job.rows * slot
    evaluated, _ = _find("qwen2.5-7b", "v5e-16", purpose="eval")
    assert "optimizer" not in evaluated[0].memory.kinds


def test_renting_names_two_slices_of_each_chip_and_what_is_too_small():
    config = TrainConfig(data=DataConfig(sequence_length=32768))
    rent = search.rank_slices(presets.preset("qwen2.5-32b"), config, purpose="train")
    names = [one.job.where.name for one in rent.ranked]
    assert len(names) == len(set(names)) and {"v5p-16", "v6e-32", "v5e-64"} <= set(names)
    assert all(one.fits() for one in rent.ranked) and rent.skipped == {}
    for chip, least in rent.too_small.items():
        assert not least.fits() and least.job.where.chip.name == chip
        fitting = [one.job.where for one in rent.ranked if one.job.where.chip.name == chip]
        assert least.job.where.num_chips < min(where.num_chips for where in fitting)


def test_a_chip_without_a_large_enough_slice_is_skipped_with_the_need():
    config = TrainConfig(data=DataConfig(sequence_length=4096))
    # Replicas of 154 billion parameters: more than any one host holds.
    rent = search.rank_slices(presets.preset("moe-plus-like"), config, purpose="decode", rows=4096)
    assert "no slice up to v5e-256 fits: at least" in rent.skipped["v5e"]
