"""The flags against the compilers that read them, and against what they are there for."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs.hardware import chips, xla_flags
from qwen_jax.analysis import ahead_of_time

# A slice of each TPU, one that has a torus: the smallest on which gathers can overlap.
SLICES = {"v4": "v4-8", "v5e": "v5e-4", "v5p": "v5p-8", "v6e": "v6e-4", "tpu7x": "tpu7x-8"}

_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import mesh_utils, topologies as ahead
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from configs.hardware import topologies
from configs.hardware import xla_flags
name, layers, width, length, flags = sys.argv[1:]
found = topologies.parse(name)
devices = ahead.get_topology_desc(
    platform="tpu", topology_name=found.topology_name, **found.topology_options
).devices
mesh = Mesh(mesh_utils.create_device_mesh((len(devices),), devices=devices), ("fsdp",))
L, D, T = int(layers), int(width), int(length)
by_row, up, down = (NamedSharding(mesh, P(*axes)) for axes in (
    ("fsdp",), (None, "fsdp"), (None, None, "fsdp")))
def loss(weights, x):
    def layer(x, weight):
        weight = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weight)
        x = jax.lax.with_sharding_constraint(x, by_row)
        return x + jax.nn.silu(x @ weight["up"]) @ weight["down"], None
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
    return (x.astype(jnp.float32) ** 2).mean()
def step(weights, x):
    value, gradients = jax.value_and_grad(loss)(weights, x)
    return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients), value
weights = {
    "up": jax.ShapeDtypeStruct((L, D, 4 * D), jnp.float32, sharding=up),
    "down": jax.ShapeDtypeStruct((L, 4 * D, D), jnp.float32, sharding=down),
}
x = jax.ShapeDtypeStruct((len(devices), T, D), jnp.bfloat16, sharding=by_row)
lowered = jax.jit(step, donate_argnums=0, out_shardings=({"up": up, "down": down}, None)).lower(
    weights, x
)
options = xla_flags.options(found.chip) if flags == "flags" else {}
text = lowered.compile(compiler_options=options).as_text()
fused = [line for line in text.splitlines() if "chain_id" in line]
print(json.dumps({"gathers": sum("all-gather(" in line for line in fused)}))
"""


def _compile(name: str, *, layers: int, width: int, length: int, flags: str) -> dict:
    """Compiles FSDP's loop over layers; how many gathers became parts of a fusion with products."""
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache takes no flag
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    sizes = (str(layers), str(width), str(length))
    command = [sys.executable, "-c", _COMPILE, name, *sizes, flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES.values(), ids=SLICES)
def test_libtpu_takes_every_flag_of_each_chip(name):
    _compile(name, layers=2, width=256, length=128, flags="flags")


@pytest.mark.slow
def test_the_flags_make_gathers_overlap_on_v4():
    sizes = {"layers": 4, "width": 2048, "length": 4096}
    assert _compile("v4-128", **sizes, flags="none")["gathers"] == 0
    assert _compile("v4-128", **sizes, flags="flags")["gathers"] > 0


def test_xla_takes_every_gpu_flag_and_refuses_an_unknown_one():
    """The CPU's jaxlib reads the same table of flags as the GPU's."""
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(4))
    with ahead_of_time.without_cache():
        lowered.compile(compiler_options=xla_flags.options(chips.CHIPS["h100"]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_flag"):
        lowered.compile(compiler_options={"xla_gpu_no_such_flag": True})


def test_every_flag_names_known_chips_and_says_why():
    for flag in xla_flags.FLAGS:
        assert set(flag.chips) <= set(chips.CHIPS)
        platforms = {chips.CHIPS[name].platform for name in flag.chips}
        assert platforms == ({"gpu"} if flag.name.startswith("xla_gpu_") else {"tpu"})
        assert len(flag.reason) > 20
    names = [flag.name for flag in xla_flags.FLAGS]
    assert len(set(names)) == len(names)


def test_the_environment_says_what_the_options_say():
    words = xla_flags.environment(chips.CHIPS["v6e"])["LIBTPU_INIT_ARGS"].split()
    assert "--xla_enable_async_all_gather=true" in words
    assert "--xla_tpu_scoped_vmem_limit_kib=49152" in words
    assert len(words) == len(xla_flags.options(chips.CHIPS["v6e"]))
    assert xla_flags.environment(chips.CHIPS["h200"]).keys() == {"XLA_FLAGS"}
    assert xla_flags.environment(chips.CHIPS["tpu7x"]) == {}
    assert xla_flags.environment(chips.CHIPS["cpu"]) == {}
