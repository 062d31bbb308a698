"""AdamW and its learning-rate schedules."""

from typing import Annotated, Literal

from configs import schema
from configs.schema import NonNegative, Positive, Range

Decay = Annotated[float, Range(min=0, below=1)]


@schema.config(prefix="optimizer.")
class OptimizerConfig:
    """AdamW with float32 masters, warm-up, then cosine or warm-up-stable-decay (WSD)."""

    peak_learning_rate: Positive[float] = 3e-4
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative[int] = 100
    decay_steps: NonNegative[int] = 0  # WSD only: length of the last, decaying stretch
    final_learning_rate_fraction: Annotated[float, Range(min=0, max=1)] = 0.1
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive[float] = 1e-8
    weight_decay: NonNegative[float] = 0.1  # on matrices and embeddings, not norms, biases
    clip_norm: Positive[float] = 1.0  # global gradient norm
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # first moment; the second is float32

    def __post_init__(self) -> None:
        schema.check(
            self.schedule != "wsd" or self.decay_steps > 0,
            "optimizer.schedule=wsd needs optimizer.decay_steps greater than 0",
        )
