"""Every field of every configuration is checked, from its type hint."""

import dataclasses
import importlib
import json
import pkgutil
import typing
from typing import Annotated, Literal

import pytest

import configs
from configs import schema
from configs.hardware import chips, topologies, xla_flags
from configs.hardware.launch import LaunchConfig
from configs.models import architecture, qwen2_5, qwen2_moe
from configs.optimizer import OptimizerConfig
from configs.schema import NonNegative, Positive, Range
from configs.train import TrainConfig

VALID = {  # a valid one of each class that has fields without a default
    "ModelConfig": qwen2_5.tiny(),
    "MoEConfig": qwen2_moe.tiny().moe,
    "YarnConfig": architecture.YarnConfig(factor=4, original_max_position_embeddings=64),
    "DualChunkConfig": architecture.DualChunkConfig(
        chunk_size=64, local_size=8, original_max_position_embeddings=64
    ),
    "QuantisationConfig": architecture.QuantisationConfig(
        method="gptq", bits=4, group_size=32, symmetric=True
    ),
    "Chip": chips.CHIPS["v5p"],
    "Slice": topologies.parse("v5p-128"),
    "Flag": xla_flags.FLAGS[0],
    "LaunchConfig": LaunchConfig(
        name="job", topology="v5p-128", project="some-project", zone="us-east5-a",
        output="gs://some-bucket/run", train="finetune",
    ),
}  # fmt: skip


def _classes() -> list[type]:
    """The dataclasses of `configs/`, but for the helper's own `Range`."""
    found = {}
    for module in pkgutil.walk_packages(configs.__path__, "configs."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value is not Range:
                found[value.__name__] = value
    return [found[name] for name in sorted(found)]


def _valid(cls: type) -> object:
    return VALID[cls.__name__] if cls.__name__ in VALID else cls()


def _fields(kind: object) -> list[tuple[type, str, object]]:
    """(class, field, part of its hint) wherever a hint is a Literal or carries a Range."""
    return [
        (cls, name, hint)
        for cls in _classes()
        for name, whole in typing.get_type_hints(cls, include_extras=True).items()
        for hint in (whole, *typing.get_args(whole))
        if typing.get_origin(hint) is kind
    ]


def _refuses(cls: type, name: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(_valid(cls), **{name: value})
    shown = value[0] if isinstance(value, tuple) else value
    assert name in str(caught.value) and str(shown) in str(caught.value)


def test_every_dataclass_of_configs_checks_its_fields():
    classes = _classes()
    assert len(classes) >= 20 and TrainConfig in classes
    for cls in classes:
        assert cls.__checks_fields__ and cls.__dataclass_params__.frozen, cls
        for hint in typing.get_type_hints(cls, include_extras=True).values():
            schema._problem(None, hint)  # raises TypeError for a hint that is not understood


@pytest.mark.parametrize(
    ("cls", "name", "hint"), _fields(Literal), ids=lambda x: getattr(x, "__name__", str(x))
)
def test_a_misspelt_choice_is_refused(cls, name, hint):
    _refuses(cls, name, f"{typing.get_args(hint)[0]}x")
    for choice in typing.get_args(hint):
        assert schema._problem(choice, hint) is None


@pytest.mark.parametrize(
    ("cls", "name", "hint"), _fields(Annotated), ids=lambda x: getattr(x, "__name__", str(x))
)
def test_a_number_just_outside_its_range_is_refused(cls, name, hint):
    kind, limits = typing.get_args(hint)[:2]
    step = 1 if kind is int else 1e-9
    outside = [
        limit + sign * by
        for limit, sign, by in (
            (limits.min, -1, step), (limits.above, 0, 0), (limits.max, 1, step),
            (limits.below, 0, 0),
        )
        if limit is not None
    ]  # fmt: skip
    assert outside
    whole = typing.get_type_hints(cls, include_extras=True)[name]
    for value in outside:
        _refuses(cls, name, (value,) if typing.get_origin(whole) is tuple else value)


def test_the_walks_find_what_they_are_for():
    assert (OptimizerConfig, "schedule") in [field[:2] for field in _fields(Literal)]
    assert len(_fields(Literal)) > 15 and len(_fields(Annotated)) > 60


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "problem"),
    [
        (int, 3, True, "must be a whole number"),
        (int, 3, 3.0, "must be a whole number"),
        (float, 3, "3", "must be a number"),
        (float, 0.5, float("nan"), "must be finite"),
        (bool, False, 0, "must be true or false"),
        (str, "", None, "must be a text"),
        (Literal[1, 2], 1, True, "is unknown; known: 1, 2"),
        (int | None, None, "x", "must be a whole number, or None"),
        (Positive[int] | None, None, 0, "must be greater than 0, or None"),
        (NonNegative[float], 0, -1, "must not be negative"),
        (Annotated[float, Range(min=2)], 2, 1, "must be at least 2"),
        (Annotated[float, Range(max=2)], 2, 3, "must be at most 2"),
        (Annotated[float, Range(below=2)], 1, 2, "must be less than 2"),
        (Annotated[float, Range(min=0, below=1)], 0, 1, "must be in [0, 1)"),
        (Annotated[float, Range(above=0, max=1, remedy="use 1")], 1, 0, "in (0, 1]; use 1"),
        (tuple[int, ...], (1, 2), [1, 2], "must be a tuple"),
        (tuple[int, ...], (), (1, "a"), "entry 'a' must be a whole number"),
        (tuple[Positive[float], ...], (1,), (1, 0), "entry 0 must be greater than 0"),
        (tuple[int, int], (1, 2), (1,), "must have 2 entries"),
        (OptimizerConfig, OptimizerConfig(), {}, "must be of type OptimizerConfig"),
    ],
    ids=str,
)
def test_kinds_of_hints(hint, right, wrong, problem):
    assert schema._problem(right, hint) is None
    assert problem in schema._problem(wrong, hint)


def test_a_hint_that_is_not_understood_is_no_free_pass():
    with pytest.raises(TypeError, match="cannot have the type hint dict"):
        schema._problem({}, dict[str, int])


def test_names_carry_the_spelling_of_the_command_line():
    with pytest.raises(ValueError, match="^optimizer.schedule='cosin' is unknown; known: cosine,"):
        OptimizerConfig(schedule="cosin")
    with pytest.raises(ValueError, match="^num_steps=0 must be greater than 0$"):
        TrainConfig(num_steps=0)


@pytest.mark.parametrize("model", [qwen2_5.tiny(), qwen2_moe.tiny(), qwen2_5.base("7b")])
def test_models_survive_json(model):
    text = json.dumps(schema.to_dict(model))
    assert architecture.model_from_dict(json.loads(text)) == model


def test_ranges_are_hints_that_the_command_line_reads_through():
    import tyro

    parsed = tyro.cli(OptimizerConfig, args=["--warmup-steps", "7", "--schedule", "constant"])
    assert parsed == OptimizerConfig(warmup_steps=7, schedule="constant")
