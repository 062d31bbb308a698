"""Mesh texts and sizes."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import mesh as mesh_config
from configs.mesh import MeshConfig
from partitioning import mesh


def test_parse():
    assert mesh.parse("") == MeshConfig(fsdp=1)
    assert mesh.parse("fsdp=4,tensor=2") == MeshConfig(fsdp=4, tensor=2)
    assert mesh.parse("data=-1,tensor=2") == MeshConfig(data=-1, fsdp=1, tensor=2)
    assert mesh.parse("tensor=2,kv_heads=replicated").kv_heads == "replicated"
    assert mesh.parse("dcn_data=2,fsdp=-1").dcn_data == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "unknown mesh axis 'model' in 'model=2'; axes are data, fsdp"),
        ("fsdp=four", "mesh axis fsdp='four' in 'fsdp=four' is not a whole number"),
        ("fsdp", "mesh axis fsdp='' in 'fsdp' is not a whole number"),
        ("fsdp=2,fsdp=4", "mesh axis 'fsdp' is given twice"),
        ("kv_heads=sharded,kv_heads=replicated", "'kv_heads' is given twice"),
        ("fsdp=0", "mesh axis fsdp=0 must be positive, or -1"),
        ("tensor=-2", "mesh axis tensor=-2 must be positive, or -1"),
        ("data=-1,fsdp=-1", "only one mesh axis may be -1"),
        ("kv_heads=half", "mesh.kv_heads='half' is unknown; known: sharded, replicated"),
        ("dcn_data=0", "dcn_data=0 must be greater than 0"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError) as caught:
        mesh.parse(text)
    assert message in str(caught.value)


SIZES = st.sampled_from([1, 2, 3, 4, 8])


@given(data=SIZES, fsdp=SIZES, tensor=SIZES, dcn=SIZES, free=st.sampled_from(["", "data", "fsdp"]))
def test_resolve_fills_the_mesh_or_raises(data, fsdp, tensor, dcn, free):
    given_sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    config = MeshConfig(**{**given_sizes, **({free: -1} if free else {})}, dcn_data=dcn)
    num_devices = data * fsdp * tensor * dcn
    sizes = mesh.resolve(config, num_devices)
    assert tuple(sizes) == mesh_config.MESH_AXES
    assert math.prod(sizes.values()) * dcn == num_devices
    assert {axis: sizes[axis] for axis in given_sizes} == given_sizes
    # One device more never fits: a whole slice is missing, or a part of one.
    if num_devices > 1 and (not free or tensor * dcn * math.prod(given_sizes.values()) > 1):
        config = dataclasses.replace(config, **given_sizes)
        with pytest.raises(ValueError):
            mesh.resolve(config, num_devices + 1)


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(fsdp=4, tensor=4), 8, "(fsdp=4, tensor=4) needs a total of 16 devices"),
        (MeshConfig(fsdp=-1, tensor=3), 8, "needs a multiple of 3 devices a slice"),
        (MeshConfig(fsdp=1), 8, "mesh (all axes 1) needs a total of 1 devices"),
        (MeshConfig(dcn_data=3), 8, "8 devices do not split into dcn_data=3 slices"),
    ],
)
def test_resolve_refuses(config, devices, message):
    with pytest.raises(ValueError) as caught:
        mesh.resolve(config, devices)
    assert message in str(caught.value)


def test_make_has_every_axis():
    made = mesh.make(MeshConfig(fsdp=1), devices=jax.devices()[:1])
    assert made.axis_names == mesh_config.MESH_AXES
    assert set(made.shape.values()) == {1}
