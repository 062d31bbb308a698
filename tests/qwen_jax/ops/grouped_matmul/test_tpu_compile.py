"""The product and its gradients compile for TPUs, with the blocks chosen for each shape."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from qwen_jax.ops.grouped_matmul import api

pytest.importorskip("libtpu")


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("E", "K", "N"), [(60, 2048, 1408), (60, 1408, 2048), (8, 3584, 2560)])
def test_value_and_gradients_compile(topology, E, K, N, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    one = jax.sharding.SingleDeviceSharding(devices[0])

    def everything(lhs_MK, rhs_EKN, sizes_E, dout_MN):
        def product(lhs_MK, rhs_EKN):
            return api.grouped_matmul(lhs_MK, rhs_EKN, sizes_E, implementation="megablox")

        out_MN, pull = jax.vjp(product, lhs_MK, rhs_EKN)
        return out_MN, pull(dout_MN)

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=one)

    M = 32_768
    arguments = shape(M, K), shape(E, K, N), shape(E, dtype=jnp.int32), shape(M, N)
    program = jax.jit(everything).lower(*arguments).compile()
    assert program.as_text().count("tpu_custom_call") >= 3
    # The operand that `outer` takes transposed is not copied: 32,768 x 1,408 would be 88 MiB.
    assert program.memory_analysis().temp_size_in_bytes < 16 * 2**20
