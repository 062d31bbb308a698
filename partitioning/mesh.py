"""Device meshes: ICI axes inside a slice, and data parallelism across slices over DCN."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from configs import mesh
from configs.mesh import MeshConfig


def resolve(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes inside one slice, with -1 replaced by the number of remaining devices.

    Raises `ValueError` if the product is not the number of devices.
    """
    per_slice, rest = divmod(num_devices, config.dcn_data)
    if rest:
        raise ValueError(
            f"{num_devices} devices do not split into dcn_data={config.dcn_data} slices; "
            f"use a divisor of {num_devices}"
        )
    sizes = {axis: getattr(config, axis) for axis in mesh.MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if free and per_slice % fixed == 0:
        sizes[free[0]] = per_slice // fixed
    elif free or fixed != per_slice:
        described = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
        raise ValueError(
            f"mesh ({described or 'all axes 1'}) needs a {'multiple' if free else 'total'} of "
            f"{fixed} devices a slice, but there are {per_slice}; set one axis to -1 to take what "
            f"is left, or choose sizes whose product is {per_slice}"
        )
    return sizes


def make(config: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of all devices, with axes `configs.schema.MESH_AXES`.

    `mesh_utils` orders devices so that neighbours on an axis are neighbours on the torus.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve(config, len(devices))
    shape = tuple(sizes[axis] for axis in mesh.MESH_AXES)
    if config.dcn_data > 1:
        across = tuple(config.dcn_data if axis == "data" else 1 for axis in mesh.MESH_AXES)
        grouped = hasattr(devices[0], "slice_index")
        array = mesh_utils.create_hybrid_device_mesh(
            shape, across, devices=devices, process_is_granule=not grouped
        )
    else:
        array = mesh_utils.create_device_mesh(shape, devices=devices)
    return jax.sharding.Mesh(np.asarray(array), mesh.MESH_AXES)


def abstract(config: MeshConfig) -> jax.sharding.AbstractMesh:
    """Abstract mesh without devices, for plans; every axis needs a size.

    Raises `ValueError` if an axis is -1: there are no devices to take.
    """
    sizes = [getattr(config, axis) for axis in mesh.MESH_AXES]
    if -1 in sizes:
        axis = mesh.MESH_AXES[sizes.index(-1)]
        raise ValueError(f"mesh axis {axis}=-1 takes what is left of the devices; name its size")
    sizes[0] *= config.dcn_data
    return jax.sharding.AbstractMesh(tuple(sizes), mesh.MESH_AXES)


def parse(text: str) -> MeshConfig:
    """Mesh config of a text such as `fsdp=4,tensor=2`; unnamed axes have size 1.

    Raises `ValueError` on an unknown or repeated axis or a size that is not a whole number.
    """
    known = (*mesh.MESH_AXES, "dcn_data", "kv_heads")
    values: dict[str, int | str] = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in known:
            raise ValueError(f"unknown mesh axis {axis!r} in {text!r}; axes are {', '.join(known)}")
        if axis in values:
            raise ValueError(f"mesh axis {axis!r} is given twice in {text!r}; give it once")
        if axis == "kv_heads":
            values[axis] = size
            continue
        try:
            values[axis] = int(size)
        except ValueError:
            raise ValueError(
                f"mesh axis {axis}={size!r} in {text!r} is not a whole number"
            ) from None
    return MeshConfig(**{"fsdp": 1, **values})
