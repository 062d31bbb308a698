"""Elements and operations of one layer: what a remat policy keeps, and what it recomputes."""

import functools

from configs.models import remat
from configs.models.architecture import ModelConfig
from qwen_jax.analysis.plan import tiles
from qwen_jax.analysis.plan.job import Job

# Arrays [B, T, F] that a layer without rematerialisation keeps beyond `minimal`: the five that
# SiLU's and the product's derivatives keep, counted in a compiled step (1.5B, v5e, scan).
_ARRAYS_OF_NONE = 5


def tensor_widths(job: Job) -> dict[str, float]:
    """Elements per token of each tensor that a policy may keep, on one device, in one layer.

    Averaged over layers, where some have experts and others do not; a shared expert's tensors go
    by the names of the dense network's. The log-sum-exp is float32: two elements.
    """
    cfg, size = job.cfg, job.layout.size
    heads = cfg.num_attention_heads / size("act_heads")
    kv_heads = cfg.num_key_value_heads / size("act_kv_heads")
    H = tiles.lanes(job, cfg.head_dim)
    F = mean_ffn(cfg) / size("act_ffn")
    rows = routed_rows(job) * _sparse_share(cfg)
    expert_F = cfg.moe.moe_intermediate_size / size("ffn") if cfg.moe else 0
    return {
        "layer_input": cfg.hidden_size,
        "q": heads * H,
        "k": kv_heads * H,
        "v": kv_heads * H,
        "attention_out": heads * (H + 2),
        "attention_residual": cfg.hidden_size,
        "mlp_gate": F,
        "mlp_up": F,
        "mlp_hidden": F,
        "expert_rows": rows * cfg.hidden_size,
        "expert_gate": rows * expert_F,
        "expert_up": rows * expert_F,
    }


def routed_rows(job: Job) -> float:
    """Rows of the experts' input buffer per token of a device, in a layer with experts.

    Dropless over X devices, a device may get every token of its X (`expert_parallel`).
    """
    moe = job.cfg.moe
    if moe is None:
        return 0.0
    if moe.capacity_factor is not None:
        return moe.num_experts_per_tok * moe.capacity_factor
    X = job.layout.size("experts")
    return X * min(moe.num_experts_per_tok, moe.num_held // X)


@functools.lru_cache(maxsize=256)
def mean_ffn(cfg: ModelConfig) -> float:
    """Hidden width of the feed-forward network that every token passes, averaged over layers."""
    shared = cfg.moe.shared_expert_intermediate_size if cfg.moe else 0
    sparse = _sparse_share(cfg)
    return (1 - sparse) * cfg.intermediate_size + sparse * shared


def saved_tensors(policy: str) -> remat.Tensors:
    """The tensors that a policy keeps; `dots` and `none` keep at least those of `minimal`."""
    return remat.tensors("minimal" if policy in ("dots", "none") else policy)


def available_in_backward(policy: str) -> set[str]:
    """The tensors that the backward pass need not recompute, kept on the device or the host."""
    if policy == "none":
        return set(remat.TENSORS)
    tensors = saved_tensors(policy)
    return {*tensors.save, *tensors.offload}


def saved_elements(job: Job) -> tuple[float, float]:
    """Elements per token that each layer keeps on the device, and those in host memory."""
    width, policy = tensor_widths(job), job.config.remat
    tensors = saved_tensors(policy)
    saved = {"layer_input", *tensors.save} - set(tensors.offload)
    device = sum(width[name] for name in saved)
    if policy == "none":
        device += _ARRAYS_OF_NONE * (width["mlp_hidden"] + width["expert_gate"])
        device += width["expert_rows"]
    return device, sum(width[name] for name in tensors.offload)


def repeated_per_token(job: Job) -> float:
    """Operations per token that the backward pass repeats, of all layers, over all devices.

    Everything between kept tensors is computed again, except what only the residual stream needs:
    the down projection never is.
    """
    cfg, policy = job.cfg, job.config.remat
    if policy in ("none", "dots"):
        return 0.0
    have = available_in_backward(policy)
    D, H = cfg.hidden_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    repeated = 0.0
    repeated += 0 if "q" in have else 2 * D * N * H
    repeated += sum(2 * D * K * H for name in ("k", "v") if name not in have)
    repeated += 0 if "attention_out" in have else 2 * N * H * job.length  # causal
    repeated += 0 if "attention_residual" in have else 2 * N * H * D
    F = mean_ffn(cfg)
    repeated += sum(2 * D * F for name in ("mlp_gate", "mlp_up") if name not in have)
    if cfg.moe:
        product = 2 * D * cfg.moe.moe_intermediate_size * cfg.moe.num_experts_per_tok
        routed = sum(product for name in ("expert_gate", "expert_up") if name not in have)
        repeated += (routed + 2 * D * cfg.moe.num_experts) * _sparse_share(cfg)
    return repeated * cfg.num_hidden_layers


@functools.lru_cache(maxsize=256)
def _sparse_share(cfg: ModelConfig) -> float:
    return len(cfg.sparse_layers) / cfg.num_hidden_layers
