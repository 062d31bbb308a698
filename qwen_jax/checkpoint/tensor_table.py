"""The one table between Hugging Face tensors and the parameter tree.

Dimensions are letters: D embed, N query heads, K kv heads, H head dim, F ffn, V vocabulary, L
layers, E experts held, M an expert's ffn, S the shared expert's, R experts that the router scores.
Hugging Face merges heads and head dim into one dimension (written `NH`) and keeps its kernels
output-major; ours are input-major, heads apart, and stacked over layers, and over experts.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from configs.models.architecture import ModelConfig

Region = Mapping[str, slice]  # dimension letter -> start and stop


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter: `dims` of one tensor in our tree, `hf_dims` of the Hugging Face tensor."""

    path: str  # keys of the tree, joined by dots
    dims: str
    hf: str  # tensor name, `{}` being the layer, and a second one the expert
    hf_dims: str  # space-separated; letters of one group are merged, the first varies slowest

    @property
    def stack(self) -> str:
        """Letters of the leading dimensions, over which tensors are stacked."""
        return "LE"[: self.hf.count("{}")]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.path.split("."))


def _row(path: str, dims: str, hf: str, hf_dims: str) -> Row:
    return Row(path=path, dims=dims, hf=hf, hf_dims=hf_dims)


_LAYER = "model.layers.{}."
_EXPERT = _LAYER + "mlp.experts.{}."
_SHARED = _LAYER + "mlp.shared_expert."
EMBED = _row("embed.weight", "VD", "model.embed_tokens.weight", "V D")
LM_HEAD = _row("lm_head.kernel", "DV", "lm_head.weight", "V D")
_NORM = _row("norm.scale", "D", "model.norm.weight", "D")
_ATTENTION = (
    _row("input_norm.scale", "D", _LAYER + "input_layernorm.weight", "D"),
    _row("attention.q.kernel", "DNH", _LAYER + "self_attn.q_proj.weight", "NH D"),
    _row("attention.q.bias", "NH", _LAYER + "self_attn.q_proj.bias", "NH"),
    _row("attention.k.kernel", "DKH", _LAYER + "self_attn.k_proj.weight", "KH D"),
    _row("attention.k.bias", "KH", _LAYER + "self_attn.k_proj.bias", "KH"),
    _row("attention.v.kernel", "DKH", _LAYER + "self_attn.v_proj.weight", "KH D"),
    _row("attention.v.bias", "KH", _LAYER + "self_attn.v_proj.bias", "KH"),
    _row("attention.o.kernel", "NHD", _LAYER + "self_attn.o_proj.weight", "D NH"),
    _row("post_attention_norm.scale", "D", _LAYER + "post_attention_layernorm.weight", "D"),
)
_MLP = (
    _row("mlp.gate.kernel", "DF", _LAYER + "mlp.gate_proj.weight", "F D"),
    _row("mlp.up.kernel", "DF", _LAYER + "mlp.up_proj.weight", "F D"),
    _row("mlp.down.kernel", "FD", _LAYER + "mlp.down_proj.weight", "D F"),
)
_MOE = (
    _row("moe.router.kernel", "DR", _LAYER + "mlp.gate.weight", "R D"),
    _row("moe.experts.gate.kernel", "DM", _EXPERT + "gate_proj.weight", "M D"),
    _row("moe.experts.up.kernel", "DM", _EXPERT + "up_proj.weight", "M D"),
    _row("moe.experts.down.kernel", "MD", _EXPERT + "down_proj.weight", "D M"),
)
_SHARED_EXPERT = (
    _row("moe.shared.gate.kernel", "DS", _SHARED + "gate_proj.weight", "S D"),
    _row("moe.shared.up.kernel", "DS", _SHARED + "up_proj.weight", "S D"),
    _row("moe.shared.down.kernel", "SD", _SHARED + "down_proj.weight", "D S"),
    _row("moe.shared_gate.kernel", "D1", _LAYER + "mlp.shared_expert_gate.weight", "1 D"),
)
# Only in native checkpoints: Hugging Face's model has no such tensor.
_ROUTER_BIAS = _row("moe.router.bias", "R", "{}", "R")


def rows(model: ModelConfig) -> tuple[Row, ...]:
    """The rows of `model`, one stack of layers after the other."""
    sparse = _ATTENTION + _MOE
    if model.moe is not None and model.moe.shared_expert_intermediate_size:
        sparse += _SHARED_EXPERT
    if has_router_bias(model):
        sparse += (_ROUTER_BIAS,)
    dense = _ATTENTION + _MLP
    found = [EMBED, *_in_stack("layers", sparse if model.sparse_layers else dense)]
    if model.sparse_layers and model.dense_layers:
        found += _in_stack("dense_layers", dense)
    found.append(_NORM)
    return tuple(found if model.tie_word_embeddings else [*found, LM_HEAD])


@functools.cache
def _in_stack(stack: str, part: tuple[Row, ...]) -> list[Row]:
    return [dataclasses.replace(row, path=f"{stack}.{row.path}") for row in part]


def has_router_bias(model: ModelConfig) -> bool:
    """Whether the parameters hold a bias that Hugging Face's qwen2_moe has no tensor for."""
    return model.moe is not None and model.moe.bias_update_rate is not None


def layers(row: Row, model: ModelConfig) -> tuple[int, ...]:
    """The model's layers that a stacked parameter holds, in order."""
    if row.keys[0] == "dense_layers":
        return model.dense_layers
    return model.sparse_layers or tuple(range(model.num_hidden_layers))


def hf_name(row: Row, model: ModelConfig, index: tuple[int, ...]) -> str | None:
    """Name of the Hugging Face tensor at `index` of the stack.

    None for experts that pad their number and for router biases, which have no tensor.
    """
    if not index:
        return row.hf
    if row.hf == _ROUTER_BIAS.hf:
        return None
    layer, *expert = index
    if expert and expert[0] >= model.moe.num_experts:
        return None
    return row.hf.format(layers(row, model)[layer], *expert)


def stack_shape(row: Row, model: ModelConfig) -> tuple[int, ...]:
    """Number of tensors stacked along each dimension of `row.stack`."""
    held = 0 if model.moe is None else model.moe.num_held
    return tuple(len(layers(row, model)) if dim == "L" else held for dim in row.stack)


def sizes(model: ModelConfig) -> dict[str, int]:
    """The size of each dimension letter of a tensor."""
    moe = model.moe
    return {
        "D": model.hidden_size,
        "N": model.num_attention_heads,
        "K": model.num_key_value_heads,
        "H": model.head_dim,
        "F": model.intermediate_size,
        "V": model.vocab_size,
        "M": 0 if moe is None else moe.moe_intermediate_size,
        "S": 0 if moe is None else moe.shared_expert_intermediate_size,
        "R": 0 if moe is None else moe.num_experts,
        "1": 1,
    }


def shape(row: Row, model: ModelConfig) -> tuple[int, ...]:
    """Shape of a parameter in our tree, the dimensions of its stack first."""
    size = sizes(model)
    return stack_shape(row, model) + tuple(size[dim] for dim in row.dims)


def hf_shape(row: Row, model: ModelConfig) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor."""
    size = sizes(model)
    return tuple(math.prod(size[dim] for dim in group) for group in row.hf_dims.split())


def hf_names(model: ModelConfig) -> dict[str, Row]:
    """The row of every tensor name that a Hugging Face checkpoint of `model` holds."""
    names = {}
    for row in rows(model):
        for index in itertools.product(*map(range, stack_shape(row, model))):
            if (name := hf_name(row, model, index)) is not None:
                names[name] = row
    return names


def first_names(names: Iterable[str]) -> str:
    """The first five names, and how many more there are, for error messages."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


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
    """The leaves of a nested tree by path, the inverse of `nest`."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def whole(row: Row, size: Mapping[str, int]) -> dict[str, slice]:
    """The region that covers the whole tensor of one layer."""
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
    """A C-contiguous copy of a transposed view, about six times as fast as numpy's.

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
