"""Small Hugging Face folders, and what is needed to look into them."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes  # noqa: F401  (lets numpy know bfloat16)
import numpy as np
import pytest
import safetensors

from configs.models.architecture import ModelConfig
from tests.support import hf_folder

TINY = ModelConfig(
    name="hf", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    bos_token_id=1, eos_token_ids=(2, 3), pad_token_id=None,
)  # fmt: skip


def make(folder: Path, *, dtype="bfloat16", max_shard_size="5GB", seed=0, **changes) -> Path:
    """A folder that transformers saves; biases and norms are random too, unlike at its start."""
    hf_folder.write(
        folder,
        dataclasses.replace(TINY, **changes),
        dtype=dtype,
        seed=seed,
        drawn=hf_folder.vectors,
        max_shard_size=max_shard_size,
    )
    (folder / "tokenizer.json").write_text('{"a": "tokenizer"}')
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors folder, read by safetensors itself."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "np") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert ours[name].shape == array.shape, name
        assert np.asarray(ours[name]).tobytes() == array.tobytes(), name


@pytest.fixture(scope="session")
def hf():
    """The helpers of this file, as tests cannot import from one another."""

    class Helpers:
        tiny = TINY

    Helpers.make = staticmethod(make)
    Helpers.tensors = staticmethod(tensors)
    Helpers.assert_same_bytes = staticmethod(assert_same_bytes)
    return Helpers


@pytest.fixture
def edit_config():
    """Changes keys of a folder's config.json."""

    def edit(folder: Path, **changes) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit
