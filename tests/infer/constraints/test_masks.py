"""Masks as an engine needs them: which rows they allow, how wide they are, what follows an end."""

import numpy as np
import pytest

from infer.constraints import compiler as constraints
from infer.constraints.spec import ConstraintSpec
from tests.infer.constraints import constrained


def test_control_tokens_and_rows_without_token_are_never_allowed():
    anything = constrained.begin("regex", "(?s).*")
    allowed = set(constrained.allowed(anything).tolist())
    control = set(constrained.WORDS.control_ids.values()) - set(constrained.EOS)
    assert not control & allowed
    assert max(allowed) < constrained.WORDS.vocab_size < constrained.ROWS
    assert set(constrained.EOS) <= allowed


@pytest.mark.parametrize("rows", [340, 352, 353, 500])
def test_masks_are_as_wide_as_the_model(rows):
    compiled = constraints.compile(
        ConstraintSpec("regex", "(?s).*"),
        tokenizer=constrained.WORDS,
        vocab_size=rows,
        eos_ids=constrained.EOS,
    )
    mask_W = compiled.start().mask()
    assert (mask_W.dtype, mask_W.shape) == (np.uint32, (-(-rows // 32),))
    allowed = np.unpackbits(mask_W.view(np.uint8), bitorder="little").nonzero()[0]
    assert set(constrained.EOS) <= set(allowed.tolist()) <= set(range(constrained.WORDS.vocab_size))


def test_after_its_end_an_answer_can_only_end():
    """As for requests that ignore eos."""
    constraint = constrained.begin("choice", ("", "a"))
    for _ in range(3):
        constraint.accept(constrained.EOS[1])
        assert set(constrained.allowed(constraint).tolist()) == set(constrained.EOS)


def test_a_token_that_is_not_allowed_is_an_error():
    constraint = constrained.begin("choice", ("yes", "no"))
    with pytest.raises(constraints.ConstraintError):
        constraint.accept(constrained.WORDS.token_id("x"))


def test_answers_of_one_form_do_not_touch_each_other():
    one, two = constrained.begin("regex", "ab|cd"), constrained.begin("regex", "ab|cd")
    one.accept(constrained.WORDS.token_id("a"))
    assert constrained.WORDS.token_id("c") in constrained.allowed(two)
    assert constrained.WORDS.token_id("c") not in constrained.allowed(one)


def test_forms_are_compiled_once():
    made = [constrained.compiled(ConstraintSpec("regex", "a+")) for _ in range(2)]
    assert made[0] is made[1]
