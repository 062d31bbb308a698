"""Bitwise and parity tests compiled as users compile: the suite turns most of XLA off.

The tests run a second time, in a process of their own, since XLA reads its flags once.
"""

import os

import jax
import pytest

from tests.support import own_process

SETTING = "QWEN_JAX_FULL_OPTIMIZATION"
# What is shown, and the tests that show it.
SHOWN = {
    "XLA's own settings": "tests/test_full_optimization.py::test_nothing_is_turned_off",
    "packed documents = each alone = transformers": "tests/parity/test_packing.py"
    "::test_packed_logits_equal_each_document_alone",
    "logits of transformers": "tests/parity/test_transformers.py::test_logits[qwen2.5-0.5b]",
    "greedy tokens of transformers": "tests/parity/test_greedy.py::test_greedy_tokens[tied]",
    "resumed = uninterrupted, bitwise": "tests/train/core/test_loop.py"
    "::test_stopped_and_gone_on_with_is_bitwise_the_same",
}
ENGINE = {
    "batched = alone, bitwise": "tests/infer/engine/test_engine.py"
    "::test_each_answer_is_that_of_the_request_alone",
    "prefill and decode = full forward": "tests/infer/engine/test_engine.py"
    "::test_what_settings_mean[plain]",
}


@pytest.mark.skipif(SETTING not in os.environ, reason="runs in the process of the next test")
def test_nothing_is_turned_off():
    assert jax.config.values["jax_disable_most_optimizations"] is False
    assert "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", "")


@pytest.mark.takes(seconds=120, reason="compiles several models at full optimisation")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(SHOWN, id="models"),
        pytest.param(ENGINE, id="engine", marks=pytest.mark.slow),
    ],
)
def test_the_numbers_hold_at_full_optimization(tests):
    passed = own_process.run_pytest(*tests.values(), setting=SETTING)
    assert passed >= len(tests)
