"""The one table between Hugging Face tensors and the parameter tree.

Dimensions are letters: D embed, N query heads, K kv heads, H head dim, F ffn, V vocabulary,
L layers. Hugging Face merges heads and head dim into one dimension (written `NH`) and keeps its
kernels output-major; ours are input-major, heads apart, and stacked over the layers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from configs import schema

Region = Mapping[str, slice]  # dimension letter -> start and stop


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter: `dims` of our tree (one layer's), `hf_dims` of the Hugging Face tensor."""

    path: str  # keys of the tree, joined by dots
    dims: str
    hf: str  # tensor name, `{}` being the layer
    hf_dims: str  # space-separated; letters of one group are merged, the first varies slowest

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.path.split("."))


def _row(path: str, dims: str, hf: str, hf_dims: str) -> Row:
    return Row(path=path, dims=dims, hf=hf, hf_dims=hf_dims)


_LAYER = "model.layers.{}."
ROWS = (
    _row("embed.weight", "VD", "model.embed_tokens.weight", "V D"),
    _row("layers.input_norm.scale", "D", _LAYER + "input_layernorm.weight", "D"),
    _row("layers.attention.q.kernel", "DNH", _LAYER + "self_attn.q_proj.weight", "NH D"),
    _row("layers.attention.q.bias", "NH", _LAYER + "self_attn.q_proj.bias", "NH"),
    _row("layers.attention.k.kernel", "DKH", _LAYER + "self_attn.k_proj.weight", "KH D"),
    _row("layers.attention.k.bias", "KH", _LAYER + "self_attn.k_proj.bias", "KH"),
    _row("layers.attention.v.kernel", "DKH", _LAYER + "self_attn.v_proj.weight", "KH D"),
    _row("layers.attention.v.bias", "KH", _LAYER + "self_attn.v_proj.bias", "KH"),
    _row("layers.attention.o.kernel", "NHD", _LAYER + "self_attn.o_proj.weight", "D NH"),
    _row("layers.post_attention_norm.scale", "D", _LAYER + "post_attention_layernorm.weight", "D"),
    _row("layers.mlp.gate.kernel", "DF", _LAYER + "mlp.gate_proj.weight", "F D"),
    _row("layers.mlp.up.kernel", "DF", _LAYER + "mlp.up_proj.weight", "F D"),
    _row("layers.mlp.down.kernel", "FD", _LAYER + "mlp.down_proj.weight", "D F"),
    _row("norm.scale", "D", "model.norm.weight", "D"),
    _row("lm_head.kernel", "DV", "lm_head.weight", "V D"),
)
EMBED, LM_HEAD = ROWS[0], ROWS[-1]


def rows(model: schema.Model) -> tuple[Row, ...]:
    """The rows that `model` has: with tied embeddings no output projection."""
    return tuple(row for row in ROWS if not (row is LM_HEAD and model.tie_word_embeddings))


def sizes(model: schema.Model) -> dict[str, int]:
    """The size behind each dimension letter."""
    return {
        "L": model.num_hidden_layers,
        "D": model.hidden_size,
        "N": model.num_attention_heads,
        "K": model.num_key_value_heads,
        "H": model.head_dim,
        "F": model.intermediate_size,
        "V": model.vocab_size,
    }


def shape(row: Row, model: schema.Model) -> tuple[int, ...]:
    """Shape of the parameter in our tree, the layer dimension first where it is stacked."""
    size = sizes(model)
    return tuple(size[dim] for dim in ("L" if row.stacked else "") + row.dims)


def hf_shape(row: Row, model: schema.Model) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor."""
    size = sizes(model)
    return tuple(math.prod(size[dim] for dim in group) for group in row.hf_dims.split())


def hf_names(model: schema.Model) -> dict[str, Row]:
    """Every tensor name that a Hugging Face checkpoint of `model` holds, with its row."""
    names = {}
    for row in rows(model):
        layers = range(model.num_hidden_layers) if row.stacked else [None]
        names |= {row.hf.format(layer): row for layer in layers}
    return names


def nest(values: Mapping[str, object]) -> dict:
    """The parameter tree of values keyed by row path."""
    tree: dict = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """The inverse of `nest`."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def whole(row: Row, size: Mapping[str, int]) -> dict[str, slice]:
    """The region of one layer's whole tensor."""
    return {dim: slice(0, size[dim]) for dim in row.dims}


def read_region(
    row: Row,
    region: Region,
    size: Mapping[str, int],
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> np.ndarray:
    """`region` of one Hugging Face tensor in our layout: a view with `row.dims` dimensions.

    `read` gives the slice of the Hugging Face tensor at the slices it is called with, one a
    dimension. Of merged dimensions only the first can be cut while reading; others are cut after.
    """
    hf_slices, split, cuts, letters = [], [], [], ""
    for outer, *inner in row.hf_dims.split():
        part = region[outer]
        stride = math.prod(size[dim] for dim in inner)
        hf_slices.append(slice(part.start * stride, part.stop * stride))
        split += [part.stop - part.start, *(size[dim] for dim in inner)]
        cuts += [slice(None), *(region[dim] for dim in inner)]
        letters += outer + "".join(inner)
    block = read(tuple(hf_slices)).reshape(split)[tuple(cuts)]
    return block.transpose([letters.index(dim) for dim in row.dims])


def write_region(
    row: Row, region: Region, size: Mapping[str, int], *, tensor: np.ndarray, block: np.ndarray
) -> None:
    """Writes `block`, `region` of a parameter in our layout, into the Hugging Face `tensor`."""
    letters = row.hf_dims.replace(" ", "")
    target = tensor.reshape([size[dim] for dim in letters])[tuple(region[dim] for dim in letters)]
    copy_blocked(block.transpose([row.dims.index(dim) for dim in letters]), target)


def copy_blocked(view: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A C-contiguous copy of a transposed view, some six times as fast as numpy's own.

    numpy would read such a view along its largest stride, touching a cache line an element. Here
    the dimension with the largest stride is cut, so that a piece of a row of the output has about
    128 elements and each line read stays in cache until it is used up.
    """
    out = np.empty(view.shape, view.dtype) if out is None else out
    result, bits = out, f"u{view.itemsize}"
    # numpy copies its own integers faster than it does bfloat16.
    view, out = view.view(bits), out.view(bits)
    if view.flags.c_contiguous:
        out[...] = view
        return result
    slowest = max(range(view.ndim), key=lambda dim: view.strides[dim] * (view.shape[dim] > 1))
    step = max(1, 128 // math.prod(view.shape[slowest + 1 :]))
    for start in range(0, view.shape[slowest], step):
        index = (slice(None),) * slowest + (slice(start, start + step),)
        out[index] = view[index]
    return result
