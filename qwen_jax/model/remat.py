"""Rematerialisation policies of `configs/models/remat.py`, for `jax.checkpoint`.

| name | saved per layer | recomputed |
| --- | --- | --- |
| none | everything | nothing |
| dots | outputs of matrix products and of the flash kernel | norms, RoPE, activations, dispatch |
| a list of tensors | those, and the layer's input | what lies between them |
| full, the empty list | the layer's input | the whole layer |

Layers mark their tensors with `checkpoint_name`. A flash kernel must mark its output and its
log-sum-exp inside its own differentiation rule, both as `attention_out`: marked outside, the output
would be saved and the kernel would run again all the same. cuDNN's is recognised by its primitive.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import Offloadable

from configs.models import remat

POLICIES = remat.POLICIES

# Kernels that are not a dot_general, and experts' batched products: saved like plain products.
_PRODUCTS = ("attention_out", "expert_gate", "expert_up")
_TO_HOST = Offloadable(src="device", dst="pinned_host")


def _name(primitive, params: dict) -> str:
    """The name by which a policy knows an equation's outputs; empty for those without one."""
    if primitive.name == "name":
        return params["name"]
    # cuDNN's one primitive gives output and log-sum-exp.
    return "attention_out" if primitive.name.startswith("dot_product_attention_fwd") else ""


def _save_products(primitive, *_, **params) -> bool:
    if primitive.name == "dot_general":
        (_, _), (batch_dims, _) = params["dimension_numbers"]
        return not batch_dims  # attention's own score products are too large to keep
    return _name(primitive, params) in _PRODUCTS


def _save(tensors: remat.Tensors) -> Callable:
    def save(primitive, *_, **params) -> bool | Offloadable:
        name = _name(primitive, params)
        return _TO_HOST if name in tensors.offload else name in tensors.save

    return save


def wrap(body: Callable, policy: str, *, layer_loop: str = "scan") -> Callable:
    """`body`, one layer, under the policy of this name. Raises `ValueError` for an unknown name.

    A scan separates forward and backward pass. In unrolled layers the compiler would merge the
    recomputation with the forward pass and save everything, so `prevent_cse` forbids it, except for
    `dots`. On one GPU `minimal` is as fast as `dots` with 11 GB less (1.5B on an H100,
    docs/experiments/rematerialisation.md); with FSDP `dots` is 3% faster, since weights gathered
    for the forward pass are saved, where other policies gather them again.
    """
    remat.check(policy)
    if policy == "none":
        return body
    if policy == "dots":
        return jax.checkpoint(body, policy=_save_products, prevent_cse=False)
    save = _save(remat.tensors(policy))
    return jax.checkpoint(body, policy=save, prevent_cse=layer_loop == "unrolled")
