"""What the backward pass recomputes: policies of `jax.checkpoint`, by name.

| name | kept per layer | recomputed |
| --- | --- | --- |
| none | everything | nothing |
| dots | outputs of matrix products and of the flash kernel | norms, RoPE, activations |
| full | the layer's input | the whole layer |
"""

from collections.abc import Callable

import jax

POLICIES = ("none", "dots", "full")


def _keep_products(primitive, *_, **params) -> bool:
    if primitive.name == "dot_general":
        (_, _), (batch_dims, _) = params["dimension_numbers"]
        return not batch_dims  # attention's own score products are too large to keep
    return primitive.name.startswith("dot_product_attention_fwd")  # cuDNN: output and log-sum-exp


def wrap(body: Callable, policy: str) -> Callable:
    """`body` of a layer scan under `policy`. Raises `ValueError` for an unknown name."""
    if policy == "none":
        return body
    if policy == "dots":
        # prevent_cse: the scan already keeps forward and backward apart.
        return jax.checkpoint(body, policy=_keep_products, prevent_cse=False)
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=False)
    raise ValueError(f"unknown remat policy {policy!r}; known: {', '.join(POLICIES)}")
