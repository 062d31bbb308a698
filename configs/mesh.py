"""Devices per mesh axis, inside a slice and across slices."""

from typing import Literal

from configs import schema
from configs.schema import Positive

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")


@schema.config(prefix="mesh.")
class MeshConfig:
    """Devices per mesh axis inside a slice (ICI) and across slices (DCN); -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    dcn_data: Positive[int] = 1  # slices over which whole replicas are spread
    kv_heads: Literal["sharded", "replicated"] = "sharded"  # over `tensor`, or on every device

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            schema.check(size == -1 or size > 0, f"mesh axis {axis}={size} must be positive, or -1")
        schema.check(
            list(sizes.values()).count(-1) <= 1,
            f"only one mesh axis may be -1 (take what is left), got {sizes}",
        )
