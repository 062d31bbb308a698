"""AdamW and its learning-rate schedules."""

from dataclasses import dataclass
from typing import Literal

from configs import schema


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with float32 masters, warm-up, then cosine or warm-up-stable-decay (WSD)."""

    peak_learning_rate: float = 3e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0  # WSD only: length of the last, decaying stretch
    final_learning_rate_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices and embeddings, not on norms and biases
    clip_norm: float = 1.0  # global gradient norm
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # first moment; the second is float32

    def __post_init__(self) -> None:
        schema.check_positive(self, "peak_learning_rate", "eps", "clip_norm")
        for name in ("b1", "b2"):
            schema.check(
                0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)"
            )
        schema.check(
            self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative"
        )
        schema.check(
            self.schedule != "wsd" or self.decay_steps > 0,
            "optimizer.schedule=wsd needs optimizer.decay_steps greater than 0",
        )
