"""A picture of a plan: memory by kind for each remat policy, and where every parameter lies."""

import dataclasses
import math
from pathlib import Path

from matplotlib.figure import Figure

from configs.models import remat
from partitioning import sharding
from qwen_jax.analysis.plan import job as job_lib
from qwen_jax.analysis.plan import memory, search
from qwen_jax.analysis.plan.search import Candidate

GiB = 2**30


def save(plan: Candidate, path: Path) -> None:
    """Writes the picture of a plan; the ending of `path` says the format.

    Raises `ValueError` for an ending that matplotlib cannot write.
    """
    num_parameters = len(job_lib.parameters(plan.job))
    figure = Figure(figsize=(15, max(5.0, 1.5 + 0.28 * num_parameters)), layout="constrained")
    left, right = figure.subplots(1, 2)
    one = plan.job
    figure.suptitle(
        f"{one.cfg.name}, {one.purpose}, {one.length:,} tokens a row, {one.where.name}, mesh "
        f"{one.mesh_text}, {one.rows} row(s) a device"
    )
    _draw_memory(left, plan)
    _draw_parameters(right, plan)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ValueError(f"picture={path}: {error}") from None


def _draw_memory(axes, plan: Candidate) -> None:
    """Draws one stacked bar per policy, the recommended one in bold, and the limit."""
    policies = remat.POLICIES if plan.job.purpose == "train" else (plan.policy,)
    policies = list(dict.fromkeys((*policies, plan.policy)))
    estimates = [
        memory.estimate(dataclasses.replace(plan.job, config=_with_policy(plan, name)))
        for name in policies
    ]
    start = [0.0] * len(policies)
    for kind, label in memory.KINDS.items():
        sizes = [one.kinds.get(kind, 0.0) / GiB for one in estimates]
        if max(sizes) > 0:
            axes.barh(policies, sizes, left=start, label=label)
            start = [a + b for a, b in zip(start, sizes, strict=True)]
    for policy, total in zip(policies, start, strict=True):
        axes.annotate(f" {total:.1f}", (total, policy), verticalalignment="center")
    axes.margins(x=0.1)  # for the longest bar's figure
    limit = memory.limit(plan.job, reserve=search.RESERVE)
    if limit is not None:
        hbm = plan.job.where.chip.device_hbm_bytes
        axes.axvline(hbm / GiB, color="black", label="memory of a device")
        axes.axvline(limit / GiB, color="black", linestyle=":", label="less the reserve")
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == plan.policy else "normal")
    axes.invert_yaxis()
    axes.set(xlabel="GiB a device", title="Memory by remat policy, at each one's peak")
    axes.legend(fontsize="small")


def _with_policy(plan: Candidate, policy: str):
    return dataclasses.replace(plan.job.config, remat=policy)


def _draw_parameters(axes, plan: Candidate) -> None:
    """Draws the bytes per device of each parameter in float32, and the mesh axes that split it."""
    leaves = sorted(job_lib.parameters(plan.job), key=lambda leaf: -leaf.local_size)
    names = [leaf.name for leaf in leaves]
    sizes = [4 * leaf.local_size / 2**20 for leaf in leaves]
    bars = axes.barh(names, sizes)
    labels = []
    for leaf in leaves:
        spec = sharding.spec(leaf.axes, plan.job.layout)
        split = [
            f"{leaf.axes[i]}/{'*'.join(entry) if isinstance(entry, tuple) else entry}"
            for i, entry in enumerate(spec)
            if entry
        ]
        parts = round(math.prod(leaf.shape) / leaf.local_size)
        labels.append(f"1/{parts}  {', '.join(split)}" if split else "whole")
    axes.bar_label(bars, labels=labels, fontsize="small", padding=3)
    axes.set_xscale("log")
    axes.set_xlim(right=max(sizes) * 100)
    axes.invert_yaxis()
    axes.set(xlabel="MiB a device, float32", title="Parameters, and the mesh axes that split them")
