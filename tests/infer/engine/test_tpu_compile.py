"""Every program in an engine's table compiles for a TPU, which need not be here."""

import jax
import jax.numpy as jnp
import pytest

from configs.engine import EngineConfig
from configs.hardware import topologies, xla_flags
from configs.models import qwen2_5
from infer.engine import program_table
from infer.speculation.draft import Draft
from partitioning import mesh, rules, sharding
from qwen_jax.analysis import ahead_of_time
from qwen_jax.decode import slot_state, weights

pytest.importorskip("libtpu")

CFG = qwen2_5.tiny()
BF16 = jnp.dtype("bfloat16")
SETTINGS = EngineConfig(
    num_slots=8,
    page_size=64,
    num_pages=128,
    max_length=1024,
    prefill_chunk=128,
    prefill_tokens=256,
    decode_steps=8,
    buckets="one",
    speculation="draft",
    guesses=4,
)
NAMES = [
    name
    for name in program_table.table(CFG, SETTINGS, dtype=BF16, draft=Draft(CFG, {}))
    if not name.startswith("embed") or name == program_table.embed_name(128)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_program_compiles(name, monkeypatch):
    for variable, value in xla_flags.WITHOUT_TPU.items():
        monkeypatch.setenv(variable, value)
    devices = ahead_of_time.devices(topologies.parse("v5e-4"))[:2]
    made = mesh.make(mesh.parse("fsdp=1,tensor=2"), devices=devices)
    layout = sharding.Layout(made, rules.rule_set("engine"))
    params = weights.shapes(
        CFG, dtype=BF16, form=weights.best_form(CFG, dtype=BF16, layout=layout), layout=layout
    )
    state = slot_state.shapes(
        CFG, num_slots=SETTINGS.num_slots, width=16, num_pages=SETTINGS.num_pages,
        page_size=SETTINGS.page_size, dtype=BF16, layout=layout,
    )  # fmt: skip
    arrays = {
        "params": params,
        "state": state,
        "slots": state.slots,
        "eos_E": jax.ShapeDtypeStruct((1,), jnp.int32, sharding=sharding.sharding((), layout)),
        "draft_params": params,
        "draft_pages": state.pages,
    }
    table = program_table.table(
        CFG, SETTINGS, dtype=BF16, layout=layout, draft=Draft(CFG, params, layout)
    )
    text = table[name].lower(arrays).compile().as_text()
    # `embed` has no pages; a prompt's beginning has nothing before it in them.
    assert ("ragged_paged_attention_kernel" in text) == (not name.startswith("embed"))
