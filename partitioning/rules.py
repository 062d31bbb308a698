"""Logical axis names, and the rule sets that map them onto mesh axes.

A rule set is a frozen value handed to every function that shards: a changed rule is a changed
argument, so it retraces. There is no global table.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from configs import mesh

# The closed set. Parameters first, then activations.
LOGICAL_AXES = (
    "layers",  # stacked layers, scanned over
    "vocab",  # rows of the embedding, columns of the output projection
    "embed",  # the residual stream's width in a matrix
    "norm",  # the same width in a norm's scale: too small to be worth gathering, so on every device
    "heads",  # query heads
    "kv_heads",  # key-value heads
    "head_dim",
    "ffn",
    "experts",
    "expert_embed",  # the residual stream's width in an expert's matrix
    "batch",  # sequences
    "length",  # tokens of a sequence
    "outer_batch",  # sequences, over those of the axes of `batch` that do not shard `embed`
    "outer_length",  # tokens of a sequence, over those of `length` that do not shard `embed`
    "outer_embed",  # the residual stream's width, over those of `embed` that do not shard `length`
    "act_embed",  # the residual stream's width in an activation
    "act_heads",
    "act_kv_heads",
    "act_ffn",
    "act_vocab",
)


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes, as a tuple of pairs; an axis that is not named is replicated."""

    name: str
    table: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        names = [logical for logical, _ in self.table]
        for logical, mesh_axes in self.table:
            check_axis(logical)
            if names.count(logical) > 1:
                raise ValueError(f"rules {self.name!r} map {logical!r} more than once")
            for axis in mesh_axes:
                if axis not in mesh.MESH_AXES:
                    raise ValueError(
                        f"rules {self.name!r} map {logical!r} to unknown mesh axis {axis!r}; "
                        f"axes are {', '.join(mesh.MESH_AXES)}"
                    )

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes that shard `logical`; `None` is a dimension without a name."""
        if logical is None:
            return ()
        check_axis(logical)
        return dict(self.table).get(logical, ())


def check_axis(logical: str) -> None:
    """Raises `ValueError` if `logical` is not in the closed set."""
    if logical not in LOGICAL_AXES:
        raise ValueError(f"unknown logical axis {logical!r}; known: {', '.join(LOGICAL_AXES)}")


# FSDP (ZeRO-3) over `fsdp`, `expert` and `context`, Megatron tensor parallelism over `tensor`, the
# batch over all data axes. Devices of `context` hold different tokens of one sequence, as devices
# of `fsdp` hold different sequences, so weights are sharded over both axes alike, and over `expert`
# too, except for the experts' own kernels. Axes are in the order of the mesh: for groups in another
# order the TPU compiler emits all-reduces in place of all-gathers and reduce-scatters.
TRAIN = Rules(
    "train",
    (
        ("vocab", ("tensor",)),
        ("embed", ("fsdp", "expert", "context")),
        ("expert_embed", ("fsdp", "context")),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("ffn", ("tensor",)),
        ("experts", ("expert",)),
        # The axes of embed come last: resharding from outer_batch to batch splits only them.
        ("batch", ("data", "fsdp", "expert")),
        ("outer_batch", ("data",)),
        ("length", ("context",)),
        ("outer_embed", ("fsdp", "expert")),
        ("act_heads", ("tensor",)),
        ("act_kv_heads", ("tensor",)),
        ("act_ffn", ("tensor",)),
        ("act_vocab", ("tensor",)),
    ),
)

# Decoding reads every weight at every token: weights stay whole along `embed`, so that no step
# gathers them. Requests of an engine come and go, and their pages may lie anywhere in the cache:
# all devices hold all rows, and heads, hidden widths, experts and the vocabulary are sharded.
# Each replica is a separate engine.
ENGINE = Rules(
    "engine",
    tuple(pair for pair in TRAIN.table if not pair[0].endswith(("embed", "batch", "length"))),
)

# Every device holds the whole model: for small models, where communication would cost more.
REPLICATED = Rules("replicated", ())


def replicate_kv_heads(rules: Rules) -> Rules:
    """`rules` with key-value heads on every device, for a tensor axis larger than their number."""
    table = tuple(pair for pair in rules.table if pair[0] not in ("kv_heads", "act_kv_heads"))
    return dataclasses.replace(rules, name=f"{rules.name}, kv heads replicated", table=table)


def rule_set(
    purpose: Literal["train", "engine"],
    *,
    kv_heads: Literal["sharded", "replicated"] = "sharded",
) -> Rules:
    """The rule set for `purpose`, with key-value heads over `tensor` or on every device."""
    rules = {"train": TRAIN, "engine": ENGINE}[purpose]
    return rules if kv_heads == "sharded" else replicate_kv_heads(rules)
