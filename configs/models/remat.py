"""Rematerialisation policies, by name or as a list of the tensors that are kept.

A spelling names the tensors of a layer that are kept on the device (`save`) and those that wait in
host memory (`offload`); the backward pass recomputes the others from them and from the layer's
input, which is always there:

    save:q,k,v,attention_out offload:mlp_gate,mlp_up

B sequences of T tokens; D embed, N heads, K key-value heads, H head dim, F ffn; R rows sent to
experts, one a token and choice. `qwen_jax/model/remat.py` turns policies into those of
`jax.checkpoint`.
"""

from configs import schema

# The closed set: name -> what it is.
TENSORS = {
    "layer_input": "[B, T, D] the residual stream before the layer: kept anyhow, offload moves it",
    "q": "[B, T, N, H] queries after RoPE",
    "k": "[B, T, K, H] keys after RoPE",
    "v": "[B, T, K, H] values",
    "attention_out": "[B, T, N, H] what attention returns, and its log-sum-exp [B, N, T]",
    "attention_residual": "[B, T, D] the residual stream between attention and MLP",
    "mlp_gate": "[B, T, F] before the activation function; a shared expert's too",
    "mlp_up": "[B, T, F] what the gate multiplies",
    "mlp_hidden": "[B, T, F] their product, which enters the down projection",
    "expert_rows": "[R, D] what experts read: kept, tokens are not sent to them twice",
    "expert_gate": "[R, F] as mlp_gate, of routed experts",
    "expert_up": "[R, F] as mlp_up, of routed experts",
}

_ATTENTION = "q,k,v,attention_out"
_MLP = "mlp_gate,mlp_up,expert_gate,expert_up"
_PRODUCTS = f"{_ATTENTION},attention_residual,{_MLP}"
LISTS = {
    "full": "",
    "save_qkv": "save:q,k,v",
    "save_attention": f"save:{_ATTENTION}",
    "save_all_but_mlp": f"save:{_ATTENTION},attention_residual",
    "minimal": f"save:{_PRODUCTS}",
    "offload_layer_input": "offload:layer_input",
    "offload_qkv": "offload:q,k,v",
    "offload_mlp": f"save:{_ATTENTION},attention_residual offload:{_MLP}",
    "offload_minimal": f"offload:{_PRODUCTS}",
}
POLICIES = ("none", "dots", *LISTS)


@schema.config()
class Tensors:
    """Names out of `TENSORS`: kept on the device, and kept in host memory."""

    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()


def tensors(policy: str) -> Tensors:
    """What `policy`, a name of `LISTS` or a spelling, keeps.

    Raises `ValueError` for an unknown name, and for a tensor that is named twice.
    """
    parts = LISTS.get(policy, policy).split()
    if policy not in LISTS and (not parts or not all(":" in part for part in parts)):
        raise ValueError(
            f"unknown remat policy {policy!r}; known: {', '.join(POLICIES)}, or tensor by tensor: "
            f"save:NAME,... offload:NAME,... with names out of {', '.join(TENSORS)}"
        )
    chosen: dict[str, list[str]] = {"save": [], "offload": []}
    for part in parts:
        verb, _, names = part.partition(":")
        if verb not in chosen:
            raise ValueError(f"remat {policy!r} says {verb!r}; known: {', '.join(chosen)}")
        chosen[verb] += names.split(",")
    named = [name for names in chosen.values() for name in names]
    for name in named:
        if name not in TENSORS:
            raise ValueError(
                f"remat {policy!r} names unknown tensor {name!r}; known: {', '.join(TENSORS)}"
            )
        if named.count(name) > 1:
            raise ValueError(f"remat {policy!r} names {name!r} more than once; choose one place")
    return Tensors(save=tuple(chosen["save"]), offload=tuple(chosen["offload"]))


def check(policy: str) -> None:
    """Raises `ValueError` unless `policy` is one of `POLICIES` or a spelling."""
    if policy not in POLICIES:
        tensors(policy)
