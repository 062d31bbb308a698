"""Loading onto devices: values, shardings, and that no more is read or held than needed."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from qwen_jax.checkpoint import load, tensor_table
from qwen_jax.checkpoint.huggingface import importer

ROOT = Path(__file__).resolve().parents[4]

EIGHT_DEVICES = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qwen_jax.checkpoint import load, resolve
from qwen_jax.checkpoint.huggingface import loader
from qwen_jax.checkpoint import tensor_table

folder, native = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
axes = {"D": "fsdp", "F": "tensor", "V": "tensor", "N": "tensor", "K": "tensor", "H": None}
specs = {
    row.path: P(*((None,) if row.stack else ()), *(axes[d] if len(row.dims) > 1 else None
                for d in row.dims))
    for row in tensor_table.rows(resolve.resolve(folder).model)
}
shardings = tensor_table.nest({path: NamedSharding(mesh, spec) for path, spec in specs.items()})

parts = []
read = loader._read_part
def watched(opened, row, index, dtype, model):
    part = read(opened, row, index, dtype, model)
    parts.append((row.path, part.nbytes))
    return part
loader._read_part = watched

plain = tensor_table.flatten(load.load_params(folder))
parts.clear()
sharded = tensor_table.flatten(load.load_params(folder, shardings=shardings))
restored = tensor_table.flatten(load.load_params(native, shardings=shardings))
assert jax.device_count() == 8
for path, array in plain.items():
    wanted = NamedSharding(mesh, specs[path])
    for other in (sharded[path], restored[path]):
        assert other.sharding == wanted, (path, other.sharding)
        assert other.dtype == array.dtype
        assert np.asarray(other).tobytes() == np.asarray(array).tobytes(), path
    largest = max(size for name, size in parts if name == path)
    shard = np.prod(wanted.shard_shape(array.shape)) * array.dtype.itemsize
    assert largest == shard, (path, largest, shard)
    # Replicas are read once.
    distinct = len({str(s.index) for s in sharded[path].addressable_shards})
    assert sum(name == path for name, _ in parts) == distinct, path
print("ok")
"""


def test_eight_devices_each_read_their_own_part(hf, tmp_path):
    folder = hf.make(tmp_path / "hf")
    importer.import_checkpoint(folder, tmp_path / "native")
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, str(folder), str(tmp_path / "native")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert result.stdout.strip() == "ok", result.stderr


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_native_and_huggingface_load_the_same(hf, tmp_path, dtype):
    folder = hf.make(tmp_path / "hf", dtype="float32", tie_word_embeddings=True)
    importer.import_checkpoint(folder, tmp_path / "native")
    theirs = tensor_table.flatten(load.load_params(folder, dtype=dtype))
    ours = tensor_table.flatten(load.load_params(tmp_path / "native", dtype=dtype))
    assert "lm_head.kernel" not in ours
    assert ours.keys() == theirs.keys()
    for path, array in theirs.items():
        assert isinstance(ours[path], jax.Array)
        assert ours[path].dtype == array.dtype == (dtype or "float32")
        assert np.asarray(ours[path]).tobytes() == np.asarray(array).tobytes(), path


def test_refusals(hf, tmp_path):
    folder = hf.make(tmp_path / "hf", dtype="float32")
    with pytest.raises(ValueError, match="dtype='int4' is not one of"):
        load.load_params(folder, dtype="int4")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=r"differ in .*embed\.weight"):
        load.load_params(folder, shardings={"norm": {"scale": device}})
    found = hf.tensors(folder)
    found["model.layers.2.mlp.down_proj.weight"][1, 1] = np.inf
    safetensors_numpy.save_file(found, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj\.weight has 1 values"):
        load.load_params(folder)
