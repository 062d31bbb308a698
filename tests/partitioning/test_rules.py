"""The closed set of logical axes, and rule sets."""

import re

import pytest

from partitioning import rules
from qwen_jax.model import module


def test_the_set_of_names_is_closed():
    with pytest.raises(ValueError, match="unknown logical axis 'width'; known: layers, vocab"):
        rules.check_axis("width")
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        rules.Rules("mine", (("width", ("tensor",)),))
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        rules.TRAIN.mesh_axes("width")
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        module.param(None, (4,), axes=("width",), init=None)


def test_a_parameter_needs_one_name_per_dimension():
    with pytest.raises(ValueError, match=r"1 logical axes \('embed',\) for a parameter of shape"):
        module.param(None, (4, 4), axes=("embed",), init=None)


def test_rules_on_an_unknown_or_repeated_axis_are_refused():
    with pytest.raises(ValueError, match="'mine' map 'ffn' to unknown mesh axis 'model'; axes are"):
        rules.Rules("mine", (("ffn", ("model",)),))
    with pytest.raises(ValueError, match="'mine' map 'ffn' more than once"):
        rules.Rules("mine", (("ffn", ("tensor",)), ("ffn", ("fsdp",))))


def test_an_axis_without_a_rule_is_on_every_device():
    assert rules.TRAIN.mesh_axes("head_dim") == ()
    assert rules.TRAIN.mesh_axes(None) == ()


def test_rule_sets_are_values():
    assert rules.rule_set("train") == rules.TRAIN
    assert hash(rules.rule_set("engine")) == hash(rules.ENGINE)
    assert rules.TRAIN != rules.ENGINE


def test_replicated_kv_heads_change_nothing_else():
    replicated = rules.rule_set("train", kv_heads="replicated")
    for logical in rules.LOGICAL_AXES:
        if re.fullmatch("(act_)?kv_heads", logical):
            assert replicated.mesh_axes(logical) == ()
        else:
            assert replicated.mesh_axes(logical) == rules.TRAIN.mesh_axes(logical)
    assert "replicated" in replicated.name


def test_an_engine_spreads_no_rows_and_no_weight_over_data_axes():
    for logical in rules.LOGICAL_AXES:
        assert set(rules.ENGINE.mesh_axes(logical)) <= {"tensor", "expert"}
    assert rules.ENGINE.mesh_axes("batch") == ()


@pytest.mark.parametrize("chosen", [rules.TRAIN, rules.ENGINE], ids=lambda r: r.name)
def test_outer_batch_is_the_batch_without_the_axes_of_embed(chosen):
    batch, outer = chosen.mesh_axes("batch"), chosen.mesh_axes("outer_batch")
    assert outer == tuple(axis for axis in batch if axis not in chosen.mesh_axes("embed"))
    # What is missing comes last: the step from one to the other splits a device's own rows.
    assert batch[: len(outer)] == outer
