"""Pre-training on longer rows."""

from configs.data import DataConfig
from configs.optimizer import OptimizerConfig
from configs.train import CheckpointConfig, TrainConfig


def long_context() -> TrainConfig:
    """The last stage of pre-training at 32,768 tokens a row (`init_from`), RoPE base 1e6.

    The Qwen2.5 report (arXiv 2412.15115, section 3.3) goes from 4,096 to 32,768 this way.
    """
    return TrainConfig(
        model="qwen2.5-0.5b",
        num_steps=2000,
        batch_size=16,
        accumulate_steps=16,
        eval_every_steps=200,
        eval_batches=8,
        data=DataConfig(sequence_length=32_768, worker_count=4, prefetch=32),
        optimizer=OptimizerConfig(peak_learning_rate=5e-5, schedule="cosine", warmup_steps=100),
        checkpoint=CheckpointConfig(every_steps=200, keep=2),
    )
