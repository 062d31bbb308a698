"""Every kind of program that an engine dispatches compiles for a TPU, which need not be here."""

import jax
import jax.numpy as jnp
import pytest

from configs.hardware import topologies, xla_flags
from configs.models import qwen2_5
from partitioning import mesh, rules, sharding
from qwen_jax.analysis import ahead_of_time
from qwen_jax.decode import programs, sampling, slot_state, weights

pytest.importorskip("libtpu")

CFG = qwen2_5.tiny()
SLOTS, WIDTH, ROWS, LENGTH, GUESSES = 8, 16, 2, 128, 4
WORDS = -(-CFG.vocab_size // 32)
BF16 = jnp.dtype("bfloat16")
CASES = [
    *[("prefill", {"prefix": p, "score": s}) for p in ("none", "pages") for s in ("no", "prompt")],
    *[(name, {"sampler": s}) for name in ("advance", "verify") for s in ("greedy", "full")],
    ("embed", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_a_program_compiles(name, options, monkeypatch):
    for variable, value in xla_flags.WITHOUT_TPU.items():
        monkeypatch.setenv(variable, value)
    devices = ahead_of_time.devices(topologies.parse("v5e-4"))[:2]
    made = mesh.make(mesh.parse("fsdp=1,tensor=2"), devices=devices)
    layout = sharding.Layout(made, rules.rule_set("engine"))
    everywhere = sharding.sharding((), layout)

    def whole(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    form = weights.best_form(CFG, dtype=BF16, layout=layout)
    params = weights.shapes(CFG, dtype=BF16, form=form, layout=layout)
    state = slot_state.shapes(
        CFG, num_slots=SLOTS, width=WIDTH, num_pages=SLOTS * WIDTH, page_size=64, dtype=BF16,
        layout=layout,
    )  # fmt: skip
    mask = whole(ROWS, WORDS, dtype=jnp.uint32)
    common = {"eos_E": whole(1), "layout": layout, **options}
    if name == "prefill":
        settings = sampling.settings([], num_rows=ROWS)
        chunks = slot_state.Chunks(
            slots_R=whole(ROWS),
            tokens_RT=whole(ROWS, LENGTH),
            starts_R=whole(ROWS),
            lengths_R=whole(ROWS),
            table_RM=whole(ROWS, WIDTH),
            last_R=whole(ROWS, dtype=bool),
            max_tokens_R=whole(ROWS),
            next_RT=whole(ROWS, LENGTH),
            seen_RW=mask,
            settings=jax.tree.map(lambda x: whole(*x.shape, dtype=x.dtype), settings),
            mask_RW=mask,
        )
        lowered = programs.prefill.lower(CFG, params, state, chunks, sampler="full", **common)
    elif name == "advance":
        lowered = programs.advance.lower(
            CFG, params, state, whole(ROWS), mask, num_steps=8, **common
        )
    elif name == "verify":
        guesses = whole(ROWS, GUESSES)
        lowered = programs.verify.lower(CFG, params, state, whole(ROWS), guesses, mask, **common)
    else:
        lowered = programs.embed.lower(
            CFG, params, whole(1, LENGTH), whole(1), dtype=BF16, layout=layout
        )
    text = lowered.compile().as_text()
    # `embed` has no pages.
    assert ("ragged_paged_attention_kernel" in text) == (name != "embed")
