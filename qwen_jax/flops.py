"""Parameters and floating-point operations of a model, and what a device could do at best.

A matrix product [m, k] x [k, n] is 2 m k n operations. Training does each product of the forward
pass once and two of its size in the backward pass; what rematerialisation repeats is not counted
(model FLOPs, arXiv 2204.02311, appendix B).
"""

from typing import Literal

from configs import chips, schema

Attention = Literal["causal", "full"]


def matmul_parameters(cfg: schema.Model) -> int:
    """Parameters that multiply every token: L (2 D N H + 2 D K H + 3 D F) + D V.

    The output projection counts, tied or not; looking an embedding up is no product and does not,
    nor do norms and biases.
    """
    D, H, F = cfg.hidden_size, cfg.head_dim, cfg.intermediate_size
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    layer = 2 * D * N * H + 2 * D * K * H + 3 * D * F
    return cfg.num_hidden_layers * layer + D * cfg.vocab_size


def parameters(cfg: schema.Model) -> int:
    """All parameters: those of the products, the embedding where untied, norms and biases."""
    D, H = cfg.hidden_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    vectors = cfg.num_hidden_layers * (2 * D + (N + 2 * K) * H) + D
    embedding = 0 if cfg.tie_word_embeddings else cfg.vocab_size * D
    return matmul_parameters(cfg) + embedding + vectors


def attention_per_token(cfg: schema.Model, *, length: int, attention: Attention) -> float:
    """Operations of q k^T and of the weighted sum, forward, for one token of a row of `length`.

    full: 4 L N H T, every query against every key (the convention of PaLM and Megatron).
    causal: half of it, 2 L N H T: what a flash kernel that skips masked blocks has to do.
    Documents packed into one row are counted as one.
    """
    width = cfg.num_attention_heads * cfg.head_dim
    full = 4.0 * cfg.num_hidden_layers * width * length
    return full if attention == "full" else full / 2


def train_per_token(cfg: schema.Model, *, length: int, attention: Attention) -> float:
    """Operations of forward and backward for one token: 3 (2 P + attention)."""
    products = 2.0 * matmul_parameters(cfg)
    return 3.0 * (products + attention_per_token(cfg, length=length, attention=attention))


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of one jax device; `None` where it is not known."""
    chip = chips.chip_of(device_kind)
    return chip.device_flops if chip else None
