"""One name for attention, many implementations: what is masked, and who computes it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from qwen_jax.attention import cudnn, reference


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: all that hold for (query t, key s).

    causal: s <= t, counted from the sequence's start.
    segment_ids_BT: equal segments only (packed documents; 0 is padding).
    lengths_B: s < length, for right-padded rows.
    """

    causal: bool = True
    segment_ids_BT: jax.Array | None = None
    lengths_B: jax.Array | None = None


jax.tree_util.register_dataclass(Mask, ["segment_ids_BT", "lengths_B"], ["causal"])

Implementation = Callable[..., jax.Array]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference.attention,
    "cudnn": cudnn.attention,
}


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    mask: Mask,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v with grouped query heads -> [B, T, N, H], in q's dtype.

    `implementation=None` takes the best that can run here; a named one that cannot raises
    `ValueError`.
    """
    if implementation is None:
        fits = cudnn.why_not(q_BTNH) is None and jax.default_backend() == "gpu"
        implementation = "cudnn" if fits else "reference"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {implementation!r}; known: "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](q_BTNH, k_BSKH, v_BSKH, mask=mask)
