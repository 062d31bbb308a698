"""Imports a GPTQ or AWQ folder as a native checkpoint, one quantised tensor at a time."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs import schema
from qwen_jax.checkpoint import block_plan, tensor_table
from qwen_jax.checkpoint.huggingface import gptq_awq, source
from qwen_jax.checkpoint.native import writer
from qwen_jax.checkpoint.quantised import stored_arrays


def import_opened(
    opened: source.Source,
    out: Path,
    *,
    max_memory: int | None,
    on_plan: Callable[[block_plan.Plan], None] | None,
    on_progress: block_plan.Progress | None,
) -> block_plan.Plan:
    """Imports an opened GPTQ or AWQ folder, one tensor of a quantised kernel at a time."""
    specs = gptq_awq.specs(opened)
    arrays: list[block_plan.Array | writer.Array] = []
    kernels: dict[str, dict[str, writer.Array]] = {}
    for row in tensor_table.rows(opened.model):
        if row.path not in specs:
            arrays.append(block_plan.array(row, opened.model, source.row_dtype(opened, row)))
            continue
        spec = specs[row.path]
        dtypes = gptq_awq.piece_dtypes(opened, row, spec)
        kernels[row.path] = {
            name: writer.Array(
                path=f"{row.path}.{name}",
                shape=shape,
                dtype=dtypes[name],
                num_stacked=len(row.stack),
            )
            for name, shape in stored_arrays.pieces(row, opened.model, spec).items()
        }
        arrays += kernels[row.path].values()

    def blocks() -> writer.Blocks:
        for row in tensor_table.rows(opened.model):
            if row.path in specs:
                for place in itertools.product(
                    *map(range, tensor_table.stack_shape(row, opened.model))
                ):
                    read = gptq_awq.read(opened, row, specs[row.path], place)
                    for name, values in read.items():
                        yield kernels[row.path][name], place, values
                continue
            stored = next(a for a in arrays if a.path == row.path)
            for block in block_plan.blocks(stored, opened.model):
                buffer = np.empty(block_plan.block_bytes(stored, block), np.uint8)
                yield stored, block.index(row), source.read_block(opened, stored, block, buffer)

    # A kernel takes its file's pages, its values at a byte each (twice), and the write buffer.
    largest = max(math.prod(a.shape[a.num_stacked :]) for k in kernels.values() for a in k.values())
    peak = block_plan.peak_bytes(max(block_plan.BLOCK_BYTES // 2, largest // 2))
    if max_memory is not None and peak > max_memory:
        raise ValueError(
            f"max_memory={max_memory / block_plan.MIB:.0f} MiB is too little; this import of "
            f"quantised kernels needs at least {math.ceil(peak / block_plan.MIB)} MiB"
        )
    planned = block_plan.Plan(
        source=opened.folder,
        target=out,
        model=opened.model,
        num_tensors=len(opened.tensors) + len(opened.packed),
        total_bytes=sum(stored.nbytes for stored in arrays),
        done_bytes=0,
        block_bytes=largest,
        peak_bytes=peak,
        max_memory=max_memory,
    )
    if on_plan:
        on_plan(planned)
    settings = schema.to_dict(opened.quantisation)
    writer.write(
        out,
        opened.model,
        arrays,
        blocks(),
        assets=opened.folder,
        on_progress=on_progress,
        source={"kind": opened.resolved.weights.format, "quantisation": settings},
        **{stored_arrays.METADATA_KEY: stored_arrays.to_json(specs)},
    )
    return planned
