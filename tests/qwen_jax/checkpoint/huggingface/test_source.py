"""Damaged folders are refused, each error naming the tensor or the file."""

import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from qwen_jax.checkpoint import dtypes, resolve
from qwen_jax.checkpoint.huggingface import source


def open_folder(folder):
    return source.open_source(resolve.resolve_huggingface(folder))


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    return hf.make(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def rewrite(folder, hf):
    """Saves the folder's tensors again, changed."""

    def save(change):
        found = hf.tensors(folder)
        change(found)
        safetensors_numpy.save_file(found, folder / "model.safetensors")
        return folder

    return save


def test_slices_are_those_of_safetensors(whole, hf):
    opened = open_folder(whole)
    for name, tensor in hf.tensors(whole).items():
        slices = tuple(slice(n // 3, n) for n in tensor.shape)
        got = source.read(opened, name, slices)
        assert got.dtype == tensor.dtype
        assert got.tobytes() == tensor[slices].tobytes()


def test_missing_tensor(rewrite):
    folder = rewrite(lambda found: found.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        open_folder(folder)


def test_extra_tensor(rewrite):
    folder = rewrite(lambda found: found.update(surplus=np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="model does not: surplus"):
        open_folder(folder)


def test_too_many_names_are_counted(rewrite):
    def drop(found):
        for name in list(found)[:9]:
            del found[name]

    with pytest.raises(ValueError, match="and 4 more"):
        open_folder(rewrite(drop))


def test_misshapen_tensor(rewrite):
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = rewrite(lambda found: found.update({name: found[name][:-1].copy()}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[31, 32\].*\[32, 32\]"):
        open_folder(folder)


def test_unsupported_dtype(rewrite):
    folder = rewrite(lambda found: found.update({"model.norm.weight": np.zeros(32, np.float64)}))
    with pytest.raises(ValueError, match="model.norm.weight has dtype F64"):
        open_folder(folder)


def test_layers_of_several_dtypes(rewrite):
    name = "model.layers.2.input_layernorm.weight"
    folder = rewrite(lambda found: found.update({name: found[name].astype(np.float32)}))
    with pytest.raises(ValueError, match="several dtypes.*bfloat16.*float32"):
        open_folder(folder)


def test_truncated_file_names_the_lost_tensors(folder):
    path = folder / "model.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    last = max(
        (k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1]
    )
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"truncated, losing {last};"):
        open_folder(folder)


@pytest.mark.parametrize("keep", [0, 4, 100])
def test_truncated_header(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        open_folder(folder)


def test_file_that_shrinks_while_open(folder):
    opened = open_folder(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="model.embed_tokens.weight is truncated"):
        source.read(opened, "model.embed_tokens.weight", (slice(0, 96), slice(0, 32)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_tensor(rewrite, value):
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(found):
        found[name] = found[name].copy()
        found[name][-1, -1] = value

    opened = open_folder(rewrite(spoil))
    with pytest.raises(ValueError, match=f"{name} has 1 values that are NaN or infinite"):
        source.read(opened, name, (slice(0, 32), slice(0, 48)))


@given(
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16]),
)
def test_finite_means_what_numpy_says(bits, dtype):
    array = np.array(bits, np.uint16).view(dtype)
    if np.isfinite(array.astype(np.float32)).all():
        dtypes.check_finite(array, "t")
    else:
        with pytest.raises(ValueError, match="t has"):
            dtypes.check_finite(array, "t")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_finite_float32(bits):
    array = np.array(bits, np.uint32).view(np.float32)
    if np.isfinite(array).all():
        dtypes.check_finite(array, "t")
    else:
        with pytest.raises(ValueError, match="t has"):
            dtypes.check_finite(array, "t")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        open_folder(folder)


def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        open_folder(tmp_path)


def test_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        open_folder(folder)


def test_whole_and_sharded_at_once(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has both"):
        open_folder(folder)


def test_shards(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert open_folder(folder).files == tuple(shards)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())

    moved = "model.norm.weight"
    wrong = next(s.name for s in shards if s.name != index["weight_map"][moved])
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], moved: wrong}}))
    with pytest.raises(ValueError, match=f"lacks tensors.*{moved}|lacks: {moved}"):
        open_folder(folder)

    path.write_text(json.dumps(index))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} is missing"):
        open_folder(folder)

    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        open_folder(folder)


def to_torch(folder, hf):
    state = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        for name, array in hf.tensors(folder).items()
    }
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_torch_file_reads_the_same(folder, whole, hf):
    to_torch(folder, hf)
    opened = open_folder(folder)
    assert opened.resolved.weights.format == "torch"
    for name, tensor in hf.tensors(whole).items():
        slices = tuple(slice(n // 3, n) for n in tensor.shape)
        assert source.read(opened, name, slices).tobytes() == tensor[slices].tobytes()


def test_torch_file_without_torch(folder, hf, monkeypatch):
    to_torch(folder, hf)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="needs torch, which is not installed"):
        open_folder(folder)


def test_torch_file_that_would_run_code(folder, hf):
    to_torch(folder, hf)
    torch.save({"a": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as a torch weights file"):
        open_folder(folder)


def test_damaged_torch_file(folder, hf):
    to_torch(folder, hf)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a torch weights file"):
        open_folder(folder)
