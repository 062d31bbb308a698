"""Recipes for pre-training from random weights, and for continued training on plain text.

Batch and learning rate of the larger runs follow the public recipes of models of their size
(Llama 2, arXiv 2307.09288, section 2.2: 4 million tokens a step, peak 3e-4, cosine to a tenth).
None of them has been run to its end here; `quickstart` has.
"""

from configs.data import DataConfig
from configs.mesh import MeshConfig
from configs.optimizer import OptimizerConfig
from configs.train import CheckpointConfig, TrainConfig


def quickstart() -> TrainConfig:
    """A tiny model on any folder of text: minutes on two CPU cores."""
    return TrainConfig(
        model="tiny",
        num_steps=300,
        batch_size=16,
        compute_dtype="float32",
        remat="none",
        loss_chunk=256,
        log_every_steps=10,
        eval_every_steps=50,
        eval_batches=4,
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(
            peak_learning_rate=3e-3, schedule="wsd", warmup_steps=20, decay_steps=60
        ),
        checkpoint=CheckpointConfig(every_steps=50, keep=2),
    )


def pretrain_0_5b() -> TrainConfig:
    """Qwen2.5-0.5B from random weights: 0.5 million tokens a step, 10.5 billion in all.

    6 x 0.5e9 x 10.5e9 operations and attention: about a day on one H100 at 400 TFLOP/s.
    """
    return TrainConfig(
        model="qwen2.5-0.5b",
        num_steps=20_000,
        batch_size=128,
        accumulate_steps=16,
        eval_every_steps=500,
        data=DataConfig(sequence_length=4096, worker_count=4, prefetch=64),
        optimizer=OptimizerConfig(
            peak_learning_rate=6e-4, schedule="wsd", warmup_steps=500, decay_steps=4000
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=3, keep_every_steps=5000),
    )


def pretrain_7b() -> TrainConfig:
    """Qwen2.5-7B from random weights on a pod: 4 million tokens a step, 1 trillion in all."""
    return TrainConfig(
        model="qwen2.5-7b",
        num_steps=240_000,
        batch_size=1024,
        eval_every_steps=1000,
        data=DataConfig(sequence_length=4096, worker_count=4, prefetch=64),
        optimizer=OptimizerConfig(peak_learning_rate=3e-4, schedule="cosine", warmup_steps=2000),
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(every_steps=1000, keep=3, keep_every_steps=20_000),
    )


def finetune() -> TrainConfig:
    """Go on training a pretrained model (`init_from`) on text of one's own, gently."""
    return TrainConfig(
        model="qwen2.5-0.5b",
        num_steps=1000,
        batch_size=32,
        accumulate_steps=8,
        eval_every_steps=100,
        data=DataConfig(sequence_length=4096),
        optimizer=OptimizerConfig(
            peak_learning_rate=1e-5, schedule="cosine", warmup_steps=50, weight_decay=0.0
        ),
        checkpoint=CheckpointConfig(every_steps=200, keep=2),
    )
