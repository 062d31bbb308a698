"""Pre-training from a folder of text: what is checked, what is kept, and going on."""

import dataclasses
import json
import types

import pytest

from configs.data import DataConfig
from train.recipes import pretrain


@pytest.fixture
def config(tmp_path, helpers, monkeypatch):
    # Compiled once for all tests here.
    once = types.SimpleNamespace(make=lambda cfg, config, layout: helpers.program(config, cfg))
    monkeypatch.setattr(pretrain, "step_lib", once)
    helpers.write_text(tmp_path / "text", documents=60)
    helpers.write_tokenizer(tmp_path / "tokenizer")
    return helpers.tiny_config(
        model=dataclasses.replace(helpers.tiny_model(), vocab_size=257, eos_token_ids=(256,)),
        output=str(tmp_path / "run"),
        num_steps=6,
        eval_batches=2,
        data=DataConfig(
            paths=(str(tmp_path / "text"),), tokenizer=str(tmp_path / "tokenizer"),
            sequence_length=32, eval_fraction=0.1,
        ),
    )  # fmt: skip


def test_a_run_what_it_leaves_and_with_what_it_goes_on(config, tmp_path, helpers):
    result = pretrain.run(config)
    run = tmp_path / "run"
    assert result.status == "finished" and result.evaluation["step"] == 6
    assert {p.name for p in run.iterdir()} == {
        "assets", "checkpoints", "metrics.jsonl", "recipe.json", "tensorboard"
    }  # fmt: skip
    assert (run / "assets" / "tokenizer.json").is_file()
    assert json.loads((run / "recipe.json").read_text())["model"]["name"] == "test"

    # Its weights can start another run, which holds out the same documents.
    heir = dataclasses.replace(
        config, init_from=str(run), model="tiny", output=str(tmp_path / "heir"), num_steps=1
    )
    pretrain.run(heir)
    with (tmp_path / "heir" / "metrics.jsonl").open() as lines:
        born = json.loads(lines.readline())
    assert born["step"] == 0 and born["loss"] == result.evaluation["loss"]

    longer = dataclasses.replace(config, num_steps=9)
    with pytest.raises(ValueError, match="batch_size: 4 -> 8"):
        pretrain.run(dataclasses.replace(longer, batch_size=8))
    assert pretrain.run(longer).step == 9
    helpers.write_tokenizer(tmp_path / "tokenizer", first_byte_last=True)
    with pytest.raises(ValueError, match="not the tokenizer that this run was started with"):
        pretrain.run(longer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": ""}, "output is empty"),
        ({"model": "qwen9"}, "unknown model 'qwen9'"),
        ({"data": {"paths": ()}}, "data.paths is empty"),
        ({"data": {"tokenizer": ""}}, "data.tokenizer is empty"),
        ({"model": {"vocab_size": 100, "eos_token_ids": (0,)}}, "vocab_size=100 .* too small"),
        ({"mesh": {"tensor": 7}}, "mesh"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, tmp_path, changes, said):
    new = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=said):
        pretrain.run(dataclasses.replace(config, **new))
    assert not (tmp_path / "run").exists()
