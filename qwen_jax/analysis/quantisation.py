"""Quantises a checkpoint's weights, saves them, and measures the increase of the loss."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.models.architecture import ModelConfig
from qwen_jax.analysis import text_loss
from qwen_jax.checkpoint import load, resolve, tensor_table
from qwen_jax.checkpoint.native import writer
from qwen_jax.checkpoint.quantised import quantised_params, stored_arrays
from qwen_jax.checkpoint.resolve import Resolved
from qwen_jax.quant import array

Progress = Callable[[int, int, str], None]
_MOST_ROWS = 64  # rows of the text, 32,768 tokens


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Bytes of the parameters and losses on a text, before and after quantisation."""

    bytes_before: int
    bytes_after: int
    before: text_loss.Loss | None = None
    after: text_loss.Loss | None = None

    def __str__(self) -> str:
        size = f"{self.bytes_before / 1e9:.3g} GB -> {self.bytes_after / 1e9:.3g} GB"
        if self.before is None:
            return size
        before, after = self.before, self.after
        return (
            f"{size}; cross-entropy of {before.num_tokens} tokens {before.nats:.4f} -> "
            f"{after.nats:.4f} nats a token ({after.nats - before.nats:+.4f}), perplexity "
            f"{before.perplexity:.3f} -> {after.perplexity:.3f}"
        )


def quantise_checkpoint(
    path: Path | str,
    out: Path | str,
    settings: quantised_params.Settings,
    *,
    text: Path | str | None = None,
    dtype: str = "bfloat16",
    on_row: Callable[[str], None] = lambda path: None,
    on_progress: Progress | None = None,
) -> Summary:
    """Writes the checkpoint at `path` quantised to `out`, on one device.

    text: a file of text on which the loss is measured, with arithmetic in `dtype`.
    Raises `ValueError` for a checkpoint that cannot be quantised so, is quantised already, or has
    no tokenizer for the text, and where `out` is in the way.
    """
    out, found = Path(out), resolve.resolve(path)
    resolve.check_not_quantised(found, remedy="quantise")
    cfg = found.model
    quantised_params.check(cfg, settings)
    if out.exists():
        raise ValueError(f"{out} exists already; delete it, or choose another place")
    rows = None
    if text is not None:
        rows = text_loss.windows(cfg, found.tokenizer, text, most=_MOST_ROWS)

    def measured(params: dict) -> text_loss.Loss | None:
        return None if rows is None else text_loss.loss(cfg, params, rows, dtype=jnp.dtype(dtype))

    params = load.load(found)
    bytes_before, before = _num_bytes(params), measured(params)
    params = quantised_params.quantise(cfg, params, settings, on_row=on_row)
    summary = Summary(
        bytes_before=bytes_before,
        bytes_after=_num_bytes(params),
        before=before,
        after=measured(params),
    )
    save(cfg, params, out, assets=found.assets, source=_origin(found), on_progress=on_progress)
    return summary


def save(
    cfg: ModelConfig,
    params: dict,
    out: Path,
    *,
    assets: Path | None,
    source: dict,
    on_progress: Progress | None = None,
) -> None:
    """Writes stacked parameters, some of them quantised, as a native checkpoint.

    Raises as `writer.write` does.
    """
    specs = quantised_params.specs(cfg, params)
    arrays, array_of = [], {}
    flat = tensor_table.flatten(params)
    for row in tensor_table.rows(cfg):
        value = flat[row.path]
        pieces = {row.path: value}
        if array.is_quantised(value):
            pieces = {f"{row.path}.{name}": piece for name, piece in value.children().items()}
        for name, piece in pieces.items():
            stacked = len(row.stack)
            arrays.append(
                writer.Array(path=name, shape=piece.shape, dtype=piece.dtype, num_stacked=stacked)
            )
            array_of[name] = piece
    writer.write(
        out,
        cfg,
        arrays,
        _blocks(arrays, array_of),
        assets=assets,
        on_progress=on_progress,
        source=source,
        **{stored_arrays.METADATA_KEY: stored_arrays.to_json(specs)},
    )


def _blocks(arrays: list[writer.Array], array_of: dict[str, jax.Array]) -> writer.Blocks:
    """Blocks of the arrays, layer by layer, so that the host holds one layer of one array."""
    for stored in arrays:
        piece = array_of[stored.path]
        if not stored.num_stacked:
            yield stored, (), np.asarray(piece)
            continue
        for layer in range(stored.shape[0]):
            values = np.asarray(piece[layer])
            for rest in _indices(stored.shape[1 : stored.num_stacked]):
                yield stored, (layer, *rest), values[rest]


def _indices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def _num_bytes(params: dict) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _origin(found: Resolved) -> dict:
    """The `source` entry of the new metadata: the import's own, else the kind of checkpoint."""
    return found.metadata.get("source", {"kind": found.kind})
