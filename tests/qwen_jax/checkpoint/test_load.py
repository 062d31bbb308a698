"""What a path turns out to be, and refusals of what is no checkpoint or another model's."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs.models import huggingface
from configs.models.architecture import ModelConfig
from qwen_jax.checkpoint import load, resolve, tensor_table
from qwen_jax.checkpoint.native import store

MODEL = ModelConfig(
    name="m", vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=16,
    bos_token_id=None, eos_token_ids=(0,), pad_token_id=None,
)  # fmt: skip


def random_params(model=MODEL):
    key = jax.random.key(0)
    return tensor_table.nest(
        {
            row.path: jax.random.normal(jax.random.fold_in(key, i), tensor_table.shape(row, model))
            for i, row in enumerate(tensor_table.rows(model))
        }
    )


def save(path, params=None, *, values=None):
    ocp.PyTreeCheckpointer().save(path / "params", params or random_params())
    (path / "model").mkdir()
    values = store.metadata(MODEL) if values is None else values
    (path / "model" / "metadata").write_text(json.dumps(values))
    return path


def save_run(output, steps=(3, 12)):
    with ocp.CheckpointManager(output / "checkpoints", item_names=("params", "model")) as manager:
        for step in steps:
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(random_params()),
                    model=ocp.args.JsonSave(store.metadata(MODEL)),
                ),
            )
        manager.wait_until_finished()
    (output / "assets").mkdir()
    return output


def test_native(tmp_path):
    path = save(tmp_path / "c")
    resolved = resolve.resolve(path)
    assert (resolved.kind, resolved.folder, resolved.assets) == ("native", path, None)
    assert (resolved.model, resolved.step) == (MODEL, None)
    (path / "assets").mkdir()
    assert resolve.resolve(str(path)).assets == path / "assets"


def test_huggingface(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(huggingface.write_model(MODEL)))
    with pytest.raises(ValueError, match="neither safetensors nor"):
        resolve.resolve(tmp_path)
    (tmp_path / "model.safetensors").touch()
    resolved = resolve.resolve(tmp_path)
    assert (resolved.kind, resolved.assets) == ("huggingface", tmp_path)
    assert resolved.model == dataclasses.replace(MODEL, name=tmp_path.name)


def test_training_run_takes_the_newest_complete_step(tmp_path):
    output = save_run(tmp_path / "run")
    resolved = resolve.resolve(output)
    assert (resolved.kind, resolved.step) == ("training", 12)
    assert resolved.folder == output / "checkpoints" / "12"
    assert resolved.assets == output / "assets"
    (output / "checkpoints" / "12" / "model" / "metadata").unlink()
    (output / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir()
    assert resolve.resolve(output).step == 3
    step = resolve.resolve(output / "checkpoints" / "3")
    assert (step.kind, step.assets) == ("native", output / "assets")
    (output / "checkpoints" / "3" / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="without a complete checkpoint yet"):
        resolve.resolve(output)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2, "model": {}}, "checkpoint format 2; this version reads 1"),
        ({"format": 1}, "has no model"),
        ({"format": 1, "model": {"layers": 3}}, "unknown model config keys"),
        ({"format": 1, "model": {"name": "m"}}, "missing .* required"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        resolve.resolve(save(tmp_path / "c", values=values))


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: it has neither"):
        resolve.resolve(tmp_path)
    with pytest.raises(ValueError, match="is not a folder$"):
        resolve.resolve(tmp_path / "nowhere")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ValueError, match="unfinished import: run it again"):
        resolve.resolve(tmp_path / "out")
    (tmp_path / "out.partial" / "import.json").touch()
    with pytest.raises(ValueError, match="unfinished import; run the import again"):
        resolve.resolve(tmp_path / "out.partial")
    (tmp_path / "half" / "params").mkdir(parents=True)
    with pytest.raises(ValueError, match="incomplete native checkpoint: params/_METADATA"):
        resolve.resolve(tmp_path / "half")


def test_params_come_back(tmp_path):
    params = random_params()
    path = save(tmp_path / "c", params)
    loaded = load.load_params(path, model=MODEL)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    half = load.load(resolve.resolve(path), dtype="bfloat16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, params
    )


def test_checkpoint_of_another_model(tmp_path):
    path = save(tmp_path / "c")
    other = dataclasses.replace(MODEL, name="wide", intermediate_size=16)
    with pytest.raises(
        ValueError,
        match=r"another model \(m, not wide\): layers\.mlp\.gate\.kernel \[2, 8, 12\] "
        r"instead of \[2, 8, 16\]",
    ):
        load.load_params(path, model=other)
    tied = dataclasses.replace(MODEL, name="tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.kernel \[8, 24\] instead of \[\]"):
        load.load_params(path, model=tied)


def test_parameters_that_do_not_fit_their_own_config(tmp_path):
    params = random_params()
    missing = {k: v for k, v in params.items() if k != "norm"}
    with pytest.raises(ValueError, match=r"lacks norm\.scale"):
        load.load_params(save(tmp_path / "missing", missing))
    extra = {**params, "more": {"kernel": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"it has also more\.kernel"):
        load.load_params(save(tmp_path / "extra", extra))
    wrong = {**params, "norm": {"scale": jnp.zeros(9)}}
    with pytest.raises(ValueError, match=r"norm\.scale has shape \[9\], .* \[8\]"):
        load.load_params(save(tmp_path / "wrong", wrong))
