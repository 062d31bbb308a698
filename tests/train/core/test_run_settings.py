"""A run goes on only with the recipe it began with."""

import dataclasses
import json

import pytest

from configs import schema
from configs.data import DataConfig
from configs.mesh import MeshConfig
from configs.models import qwen2_5
from configs.optimizer import OptimizerConfig
from configs.recipes import registry as recipes
from configs.train import CheckpointConfig, TrainConfig
from train.core import run_settings

CFG = qwen2_5.preset("tiny")


def started(tmp_path, **changes) -> TrainConfig:
    config = TrainConfig(model="tiny", output=str(tmp_path), **changes)
    run_settings.claim(tmp_path, config, CFG)
    return config


def test_the_recipe_is_kept_with_the_whole_model(tmp_path):
    started(tmp_path)
    saved = json.loads((tmp_path / "recipe.json").read_text())
    assert saved["model"]["hidden_size"] == 128 and saved["batch_size"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 16}, "batch_size: 8 -> 16"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"num_steps": 2000}, "num_steps: 1000 -> 2000"),  # a cosine has its length in it
        ({"data": DataConfig(paths=("x",))}, r"data.paths: \[\] -> \['x'\]"),
        ({"optimizer": OptimizerConfig(b2=0.99)}, "optimizer.b2: 0.95 -> 0.99"),
    ],
)
def test_what_breaks_continuity_is_refused_by_name(tmp_path, changes, said):
    config = started(tmp_path)
    before = (tmp_path / "recipe.json").read_text()
    with pytest.raises(ValueError, match=said):
        run_settings.claim(tmp_path, dataclasses.replace(config, **changes), CFG)
    assert (tmp_path / "recipe.json").read_text() == before


def test_another_model_is_refused(tmp_path):
    config = started(tmp_path)
    with pytest.raises(ValueError, match="model.tie_word_embeddings: True -> False"):
        run_settings.claim(tmp_path, config, qwen2_5.preset("tiny-untied"))


def test_what_is_harmless_may_change(tmp_path):
    config = started(tmp_path, optimizer=OptimizerConfig(schedule="wsd", decay_steps=50))
    changed = dataclasses.replace(
        config,
        num_steps=2000,
        log_every_steps=1,
        accumulate_steps=2,
        mesh=MeshConfig(tensor=2),
        checkpoint=CheckpointConfig(every_steps=7),
        data=dataclasses.replace(config.data, worker_count=2),
        optimizer=dataclasses.replace(config.optimizer, decay_steps=500),
    )
    run_settings.claim(tmp_path, changed, CFG)
    assert json.loads((tmp_path / "recipe.json").read_text())["num_steps"] == 2000


def test_harmless_names_are_fields():
    known = set(schema.flatten(schema.to_dict(TrainConfig())))
    for name in run_settings.HARMLESS | {"num_steps", "optimizer.decay_steps"}:
        assert any(field == name or field.startswith(name + ".") for field in known), name


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_name_models_and_fit_their_schedules(name):
    from train.core import optimizer

    config = recipes.recipe(name)
    qwen2_5.preset(config.model)
    optimizer.schedule(config.optimizer, num_steps=config.num_steps)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="unknown recipe 'x'; recipes are quickstart"):
        recipes.recipe("x")
