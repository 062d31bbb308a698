"""Counting what a program sends: on a text written for it, and on real programs of libtpu."""

import textwrap

import pytest

from qwen_jax.analysis import hlo

# Three rounds of a loop with a gather, and a reduce-scatter as XLA:TPU writes it; a start and its
# done; one collective cloned into two fusions of a chain.
PROGRAM = textwrap.dedent("""\
    HloModule jit_f, is_scheduled=true

    %add.1 (a.1: f32[], b.1: f32[]) -> f32[] {
      ROOT %sum.1 = f32[] add(%a.1, %b.1)
    }

    %all-reduce-scatter.1 (input.1: bf16[64,8]) -> bf16[16,8] {
      %all-reduce.9 = bf16[64,8]{1,0} all-reduce(%input.1), channel_id=1, to_apply=%add.1
      ROOT %slice.1 = bf16[16,8]{1,0} dynamic-slice(%all-reduce.9, %c.1, %c.2)
    }

    %first.1 (p.1: f32[8,8]) -> f32[8,8] {
      ROOT %all-reduce.5 = f32[8,8]{1,0} all-reduce(%p.1), frontend_attributes={chain_id="7"}
    }

    %second.1 (p.2: f32[8,8]) -> f32[8,8] {
      ROOT %all-reduce.6 = f32[8,8]{1,0} all-reduce(%p.2), frontend_attributes={chain_id="7"}
    }

    %body.1 (carry.1: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
      %gather.1 = bf16[64,8]{1,0} all-gather(%x.1), channel_id=2, dimensions={0}
      %scatter.1 = bf16[16,8]{1,0} fusion(%gather.1), kind=kCustom, calls=%all-reduce-scatter.1
      %product.1 = bf16[64,8]{1,0} fusion(%gather.1), kind=kLoop, calls=%add.1, backend_config={"estimated_cycles":"100"}
      ROOT %next.1 = (s32[], bf16[64,8]) tuple(%i.1, %product.1)
    }

    %condition.1 (carry.2: (s32[], bf16[64,8])) -> pred[] {
      %limit.1 = s32[]{:T(128)} constant(3)
      ROOT %less.1 = pred[] compare(%i.2, %limit.1), direction=LT
    }

    ENTRY %main.1 (arg.1: bf16[64,8]) -> f32[8,8] {
      %loop.1 = (s32[], bf16[64,8]) while(%start.1), condition=%condition.1, body=%body.1
      %sent.1 = (f32[4,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%y.1), channel_id=3
      %came.1 = f32[8,8]{1,0} collective-permute-done(%sent.1)
      %one.1 = f32[8,8]{1,0} fusion(%came.1), kind=kCustom, calls=%first.1, backend_config={"estimated_cycles":"7"}
      ROOT %two.1 = f32[8,8]{1,0} fusion(%one.1), kind=kCustom, calls=%second.1
    }
    """)  # noqa: E501


def test_loops_multiply_and_each_collective_counts_once():
    program = hlo.read(PROGRAM)
    assert program.moved == {
        "all-gather": hlo.Moved(count=3, num_bytes=3 * 64 * 8 * 2),
        "reduce-scatter": hlo.Moved(count=3, num_bytes=3 * 16 * 8 * 2),
        "all-reduce": hlo.Moved(count=1, num_bytes=8 * 8 * 4, overlapped=1),
        "collective-permute": hlo.Moved(count=1, num_bytes=8 * 8 * 4, overlapped=1),
    }
    assert program.cycles == 3 * 100 + 7


@pytest.mark.parametrize("limit", ["", "%other.1 = s32[] constant(4)\n"])
def test_a_loop_of_unknown_length_counts_once(limit):
    text = PROGRAM.replace("  %limit.1 = s32[]{:T(128)} constant(3)\n", limit and f"  {limit}")
    rounds = 4 if limit else 1
    assert hlo.read(text).moved["all-gather"].count == rounds
