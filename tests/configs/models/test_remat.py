"""Policies are checked where they are written, without JAX."""

import subprocess
import sys

import pytest

from configs.models import remat
from configs.train import TrainConfig


def test_a_spelling_says_what_is_kept_and_where():
    got = remat.tensors("save:q,k,v,attention_out offload:mlp_gate,mlp_up")
    assert got.save == ("q", "k", "v", "attention_out") and got.offload == ("mlp_gate", "mlp_up")
    assert remat.tensors("offload:layer_input").save == ()


def test_every_named_list_holds_known_tensors():
    for name in remat.LISTS:
        kept = remat.tensors(name)
        assert {*kept.save, *kept.offload} <= set(remat.TENSORS)
        assert name == "full" or kept.save or kept.offload
        assert name.startswith("offload_") == bool(kept.offload)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("some", "unknown remat policy 'some'; known: none, dots, full, save_qkv"),
        ("", "unknown remat policy ''"),
        ("save", "unknown remat policy 'save'"),
        ("none dots", "unknown remat policy 'none dots'"),
        ("keep:q", "says 'keep'; known: save, offload"),
        ("save:q,kv", "names unknown tensor 'kv'; known: layer_input, q, k, v, attention_out"),
        ("save:q, k", "unknown remat policy 'save:q, k'"),
        ("save:", "names unknown tensor ''"),
        ("save:q,k offload:k", "names 'k' more than once"),
    ],
)
def test_anything_else_is_refused_with_what_is_known(policy, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(remat=policy)


def test_a_recipe_is_checked_without_jax():
    code = "import sys; from configs.train import TrainConfig; TrainConfig(remat='minimal'); "
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
