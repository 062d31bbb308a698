"""Sizes of arrays that a TPU lays out in tiles of 8 x 128 elements.

The two dimensions chosen to lie innermost are padded to whole tiles, the inner one to 128 lanes,
the other to 8 sublanes (of fewer than 8: to a power of two). Where FSDP leaves a device two or a
dozen rows of a matrix, that is no small part. Sizes are of the layout that wastes least, which is
what the compiler picks for parameters: of every program in docs/pods.jsonl, the arguments come out
right to 10 kB.
"""

import functools
import itertools
import math

from qwen_jax.analysis.plan.job import Job

LANES, SUBLANES = 128, 8


def size(job: Job, shape: tuple[int, ...]) -> int:
    """Number of elements of an array of `shape`, padding included."""
    return _size(shape) if job.where.chip.platform == "tpu" else math.prod(shape)


def stacked(job: Job, shape: tuple[int, ...]) -> int:
    """Number of padded elements of an array that is written slice by slice, a layer at a time."""
    return shape[0] * size(job, shape[1:])


def lanes(job: Job, width: int) -> int:
    """`width` padded to whole lanes, as the inner dimension."""
    return _round_up(width, LANES) if job.where.chip.platform == "tpu" else width


def is_whole(job: Job, rows: int) -> bool:
    """Whether shares of `rows` rows follow each other without padding."""
    return job.where.chip.platform != "tpu" or rows % SUBLANES == 0


@functools.lru_cache(maxsize=4096)
def _size(shape: tuple[int, ...]) -> int:
    if len(shape) == 1:
        return _round_up(shape[0], LANES)
    return min(
        math.prod(shape) // (shape[i] * shape[j]) * _round_up(shape[i], LANES) * _sublanes(shape[j])
        for i, j in itertools.permutations(range(len(shape)), 2)
    )


def _sublanes(rows: int) -> int:
    return _round_up(rows, SUBLANES) if rows > SUBLANES // 2 else 1 << (rows - 1).bit_length()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
