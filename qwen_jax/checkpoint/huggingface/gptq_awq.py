"""Kernels of GPTQ and AWQ checkpoints, read into our layout.

A kernel of C inputs and O outputs, with groups of g inputs and P = 32 / bits numbers per word, is:

    GPTQ  qweight [C / P, O]: input P i + k is the k-th number of word i, the lowest bits first.
          qzeros [C / g, O / P]: output P j + k alike, one less than the zero point is.
          scales [C / g, O]. g_idx [C]: the group of each input, i / g unless desc_act.
          w = s (q - z) (arXiv 2210.17323; AutoGPTQ's first format, which Qwen published)
    AWQ   qweight [C, O / 8] and qzeros [C / g, O / 8], packed along the outputs: number k of word j
          is output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k]. scales [C / g, O].
          w = s (q - z) (arXiv 2306.00978; AutoAWQ's gemm version)

q and z are unsigned; ours are those less half the range. Nothing is rounded: scales stay as stored.
"""

import itertools

import numpy as np

from configs.models.architecture import ModelConfig, QuantisationConfig
from qwen_jax.checkpoint import dtypes, tensor_table
from qwen_jax.checkpoint.huggingface import source
from qwen_jax.checkpoint.quantised import stored_arrays

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def specs(opened: source.Source) -> dict[str, stored_arrays.Spec]:
    """The storage of each quantised parameter of a folder by path, from the files' headers.

    Raises `ValueError` naming tensors that are missing, misshapen, of another dtype or value than
    config.json's quantization_config says, or of a parameter that cannot be quantised here.
    """
    settings, model = opened.quantisation, opened.model
    found = {}
    for row in tensor_table.rows(model):
        names = _names(row, model)
        packed = [name for name in names if f"{_base(name)}.qweight" in opened.packed]
        if not packed:
            continue
        if not stored_arrays.is_linear(row):
            raise ValueError(f"{_base(packed[0])}.qweight: {row.path} cannot be quantised here")
        if len(packed) < len(names):
            plain = next(name for name in names if name not in packed)
            raise ValueError(
                f"{_base(packed[0])} is quantised and {_base(plain)} is not; all layers must be "
                f"alike"
            )
        for name in names:
            _check(opened, row, _base(name))
        scales = {opened.packed[f"{_base(name)}.scales"].dtype for name in names}
        if len(scales) > 1:
            raise ValueError(f"{row.hf}: scales have several dtypes: {sorted(scales)}")
        found[row.path] = stored_arrays.Spec(
            format="int4" if settings.bits == 4 else "int8",
            group_size=_group(settings, row, model),
            has_zeros=not settings.symmetric,
            has_order=settings.ordered and settings.group_size is not None,
        )
    return found


def scale_dtype(opened: source.Source, row: tensor_table.Row) -> np.dtype:
    """The dtype of a parameter's scales."""
    name = _names(row, opened.model)[0]
    return dtypes.DTYPES[opened.packed[f"{_base(name)}.scales"].dtype]


def piece_dtypes(opened: source.Source, row: tensor_table.Row, spec: stored_arrays.Spec) -> dict:
    """Dtype of each array of a quantised parameter by name."""
    by_name = {
        "values": np.dtype("uint8" if spec.format == "int4" else "int8"),
        "scales": scale_dtype(opened, row),
        "zeros": np.dtype("int8"),
        "order": np.dtype("int32"),
    }
    return {name: by_name[name] for name in stored_arrays.pieces(row, opened.model, spec)}


def read(
    opened: source.Source, row: tensor_table.Row, spec: stored_arrays.Spec, place: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The arrays of the tensor at `place` of a parameter's stack, in our layout.

    Experts that only pad their number are zeros. Raises `ValueError` for scales that are not
    finite, and for numbers that contradict config.json.
    """
    model, settings = opened.model, opened.quantisation
    shapes = {
        name: shape[len(row.stack) :]
        for name, shape in stored_arrays.pieces(row, model, spec).items()
    }
    name = tensor_table.hf_name(row, model, place)
    if name is None:
        zeros = piece_dtypes(opened, row, spec)
        return {piece: np.zeros(shape, zeros[piece]) for piece, shape in shapes.items()}
    base, half = _base(name), 1 << (settings.bits - 1)

    def tensor(piece: str) -> np.ndarray:
        return source.read_packed(opened, f"{base}.{piece}")

    unpack = {"gptq": _unpack_gptq, "awq": _unpack_awq}[settings.method]
    values_CO, zeros_SO = unpack(tensor("qweight"), tensor("qzeros"), settings.bits)
    order = _order(opened, base, spec, num_inputs=values_CO.shape[0])
    pieces = {"scales": tensor("scales")}
    dtypes.check_finite(pieces["scales"], f"{base}.scales")
    if spec.has_order:
        values_CO, pieces["order"] = values_CO[order], order
    if spec.has_zeros:
        pieces["zeros"] = (zeros_SO.astype(np.int16) - half).astype(np.int8)
    elif (zeros_SO != half).any():
        raise ValueError(
            f"{base}.qzeros has zero points other than {half}, though config.json says sym=true"
        )
    if spec.format == "int4":
        pairs = values_CO.reshape(-1, 2, stored_arrays.PACKED // 2, values_CO.shape[1])
        pieces["values"] = pairs[:, 0] | (pairs[:, 1] << 4)
    else:
        pieces["values"] = (values_CO ^ half).view(np.int8)
    return {piece: pieces[piece].reshape(shape) for piece, shape in shapes.items()}


def _base(name: str) -> str:
    return name.removesuffix(".weight")


def _names(row: tensor_table.Row, model: ModelConfig) -> list[str]:
    """The Hugging Face tensors of a parameter, stacked ones in order."""
    places = itertools.product(*map(range, tensor_table.stack_shape(row, model)))
    names = (tensor_table.hf_name(row, model, place) for place in places)
    return [name for name in names if name is not None]


def _group(settings: QuantisationConfig, row: tensor_table.Row, model: ModelConfig) -> int | None:
    """Number of inputs that share a scale; None where all do.

    Raises `ValueError` where the last group would be smaller.
    """
    size, inputs = settings.group_size, tensor_table.hf_shape(row, model)[1]
    if size is None or size == inputs:
        return None
    if inputs % size:
        raise ValueError(
            f"{row.hf}: {inputs} inputs are no multiple of quantization_config.group_size={size}; "
            f"a last, smaller group is not supported"
        )
    return size


def _check(opened: source.Source, row: tensor_table.Row, base: str) -> None:
    """Raises `ValueError` where a kernel's tensors are not those that config.json asks for."""
    settings = opened.quantisation
    outputs, inputs = tensor_table.hf_shape(row, opened.model)
    groups = inputs // (_group(settings, row, opened.model) or inputs)
    word = 32 // settings.bits
    along_outputs = settings.method == "awq"
    if inputs % 32 or outputs % word:
        raise ValueError(
            f"{base}: {inputs} inputs and {outputs} outputs are no multiples of 32 and {word}"
        )
    expected = {
        "qweight": (inputs, outputs // word) if along_outputs else (inputs // word, outputs),
        "qzeros": (groups, outputs // word),
        "scales": (groups, outputs),
    }
    if settings.ordered:
        expected["g_idx"] = (inputs,)
    for piece, shape in expected.items():
        tensor = opened.packed.get(f"{base}.{piece}")
        if tensor is None:
            raise ValueError(f"{opened.folder} lacks {base}.{piece}")
        if tensor.shape != shape:
            raise ValueError(
                f"{base}.{piece} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        known = tuple(dtypes.DTYPES) if piece == "scales" else ("I32",)
        if tensor.dtype not in known:
            raise ValueError(
                f"{base}.{piece} has dtype {tensor.dtype}; supported: {', '.join(known)}"
            )


def _unpack_gptq(
    qweight: np.ndarray, qzeros: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned values q [C, O] and zero points z [S, O]."""
    values_CO = np.empty((qweight.shape[0] * (32 // bits), qweight.shape[1]), np.uint8)
    for k, numbers in _numbers(qweight, bits):
        values_CO[k :: 32 // bits] = numbers
    zeros_SO = np.empty((qzeros.shape[0], qzeros.shape[1] * (32 // bits)), np.uint8)
    for k, numbers in _numbers(qzeros, bits):
        zeros_SO[:, k :: 32 // bits] = numbers
    # Stored less 1, and wrapped: a zero point of 0 is stored as the largest number.
    return values_CO, (zeros_SO + np.uint8(1)) & np.uint8((1 << bits) - 1)


def _unpack_awq(
    qweight: np.ndarray, qzeros: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned values q [C, O] and zero points z [S, O]."""
    found = []
    for words in (qweight, qzeros):
        unpacked = np.empty((words.shape[0], words.shape[1] * 8), np.uint8)
        for k, numbers in _numbers(words, bits):
            unpacked[:, _AWQ_ORDER[k] :: 8] = numbers
        found.append(unpacked)
    return found[0], found[1]


def _numbers(words: np.ndarray, bits: int):
    """Pairs of k and the k-th number of every word, the lowest bits first."""
    unsigned = words.view(np.uint32)
    for k in range(32 // bits):
        yield k, ((unsigned >> np.uint32(bits * k)) & np.uint32((1 << bits) - 1)).astype(np.uint8)


def _order(
    opened: source.Source, base: str, spec: stored_arrays.Spec, *, num_inputs: int
) -> np.ndarray | None:
    """Indices of the inputs sorted by group; None where they are sorted already.

    Raises `ValueError` where g_idx is no division into equal groups."""
    size = spec.group_size or num_inputs
    if f"{base}.g_idx" not in opened.packed:
        return None
    groups_C = source.read_packed(opened, f"{base}.g_idx")
    if spec.has_order:
        order = np.argsort(groups_C, kind="stable").astype(np.int32)
        groups_C = groups_C[order]
    else:
        order = None
    if (groups_C != np.arange(num_inputs) // size).any():
        setting = "desc_act=true" if spec.has_order else "desc_act=false"
        raise ValueError(
            f"{base}.g_idx is no division into groups of {size}, as {setting} asks for"
        )
    return order
