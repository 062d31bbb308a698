"""Shapes of the device's programs: the rows and lengths that dispatches are padded to. No jax."""

from dataclasses import dataclass

from configs.engine import EngineConfig

_SHORTEST = 64  # tokens; a program of fewer takes as long: it reads the same weights
_HALVED = 512  # tokens from which lengths are closer: there padding costs the most


@dataclass(frozen=True)
class Shapes:
    """Every shape that a scheduler asks for: those to compile before the first request."""

    prefill: tuple[tuple[int, int], ...]  # (num_rows, length)
    decode: tuple[int, ...]  # num_rows


def granularity(settings: EngineConfig) -> int:
    """Tokens that prompts which begin alike share at a time; see `PageTable`.

    A page; with one bucket a chunk, so that a prompt is cut at the same places whatever is cached.
    """
    return settings.prefill_chunk if settings.buckets == "one" else settings.page_size


def shapes(settings: EngineConfig) -> Shapes:
    """All shapes of prefills and decodes under these settings, smallest first."""
    return Shapes(
        prefill=tuple(
            (num_rows, length)
            for length in lengths(settings)
            for num_rows in rows(settings, length)
        ),
        decode=decode_rows(settings),
    )


def _doubles(least: int, most: int) -> tuple[int, ...]:
    """`least`, its doubles below `most`, and `most`."""
    sizes = []
    while least < most:
        sizes.append(least)
        least *= 2
    return (*sizes, most)


def lengths(settings: EngineConfig) -> tuple[int, ...]:
    """Lengths of prefills: powers of two, and from `_HALVED` on what lies halfway between them."""
    most = settings.prefill_chunk
    if settings.buckets == "one":
        return (most,)
    sizes = _doubles(_SHORTEST, most)
    halfway = {size * 3 // 4 for size in sizes if size >= _HALVED and size & (size - 1) == 0}
    return tuple(sorted({*sizes, *halfway}))


def rows(settings: EngineConfig, length: int) -> tuple[int, ...]:
    """Numbers of rows of a prefill: the most, about half of them, 1/8, 1/32 ... of them; and 1."""
    most = min(settings.num_slots, settings.prefill_tokens // length)
    if settings.buckets == "one":
        return (most,)
    sizes = _doubles(1, most)[::-1]
    return tuple(sorted({1, most, *sizes[1::2]}))


def decode_rows(settings: EngineConfig) -> tuple[int, ...]:
    """Numbers of rows of a decode."""
    return (settings.num_slots,) if settings.buckets == "one" else _doubles(1, settings.num_slots)


def round_up(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds so many."""
    return next(bucket for bucket in buckets if bucket >= size)
