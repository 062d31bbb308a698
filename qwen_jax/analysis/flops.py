"""Parameters and floating-point operations of a model, and what a device could do at best.

A matrix product [m, k] x [k, n] is 2 m k n operations. Training does each product of the forward
pass once and two of its size in the backward pass; what rematerialisation repeats is not counted
(model FLOPs, arXiv 2204.02311, appendix B).
"""

from typing import Literal

from configs.hardware import chips
from configs.models.architecture import ModelConfig

Attention = Literal["causal", "full"]
Count = Literal["all", "activated"]  # experts counted: every one, or those that one token uses


def matmul_parameters(cfg: ModelConfig, *, count: Count = "activated") -> int:
    """Number of parameters that multiply a token: L (2 D N H + 2 D K H) + feed-forward + D V.

    Feed-forward of a dense layer: 3 D F; of a layer with experts: E experts, or the chosen ones,
    the shared one and its gate D, the router D E. The output projection counts, tied or not;
    looking an embedding up is no product and does not, nor do norms and biases.
    `all` counts every expert, without those that pad their number.
    """
    D, H = cfg.hidden_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    attention = cfg.num_hidden_layers * (2 * D * N * H + 2 * D * K * H)
    dense = len(cfg.dense_layers) * 3 * D * cfg.intermediate_size
    return attention + dense + _experts(cfg, count) + D * cfg.vocab_size


def _experts(cfg: ModelConfig, count: Count) -> int:
    if cfg.moe is None:
        return 0
    D, E, moe = cfg.hidden_size, cfg.moe.num_experts, cfg.moe
    used = E if count == "all" else moe.num_experts_per_tok
    shared = moe.shared_expert_intermediate_size
    layer = used * 3 * D * moe.moe_intermediate_size + D * E + (3 * D * shared + D if shared else 0)
    return len(cfg.sparse_layers) * layer


def parameters(cfg: ModelConfig, *, count: Count = "all") -> int:
    """Number of parameters, all or those that a token uses: kernels, embedding, norms, biases."""
    D, H = cfg.hidden_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    vectors = cfg.num_hidden_layers * (2 * D + (N + 2 * K) * H) + D
    embedding = 0 if cfg.tie_word_embeddings else cfg.vocab_size * D
    return matmul_parameters(cfg, count=count) + embedding + vectors


def attention_per_token(cfg: ModelConfig, *, length: int, attention: Attention) -> float:
    """Operations of q k^T and of the weighted sum for one token of a row of `length`, forward.

    full: 4 L N H T, every query against every key (the convention of PaLM and Megatron).
    causal: half of it, 2 L N H T: what a flash kernel that skips masked blocks has to do.
    Documents packed into one row are counted as one.
    """
    width = cfg.num_attention_heads * cfg.head_dim
    full = 4.0 * cfg.num_hidden_layers * width * length
    return full if attention == "full" else full / 2


def train_per_token(cfg: ModelConfig, *, length: int, attention: Attention) -> float:
    """Operations of one training token, forward and backward: 3 (2 P + attention), P activated."""
    products = 2.0 * matmul_parameters(cfg)
    return 3.0 * (products + attention_per_token(cfg, length=length, attention=attention))


def peak(device_kind: str) -> float | None:
    """Peak dense bfloat16 operations per second of one JAX device; None where unknown."""
    chip = chips.chip_of(device_kind)
    return chip.device_flops if chip else None
