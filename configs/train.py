"""Settings of one training run, its checkpoints included."""

from dataclasses import field
from typing import Annotated, Literal

from configs import schema
from configs.cluster import ClusterConfig
from configs.data import DataConfig
from configs.mesh import MeshConfig
from configs.models import remat
from configs.models.architecture import ExpertTrainingConfig, ModelConfig
from configs.optimizer import OptimizerConfig
from configs.schema import NonNegative, Positive, Range


@schema.config(prefix="checkpoint.")
class CheckpointConfig:
    """Interval of checkpoints, and the number of checkpoints kept."""

    every_steps: Positive[int] = 500
    keep: Positive[int] = 3  # newest checkpoints kept
    # Checkpoints of steps divisible by this number are never removed; 0: none
    keep_every_steps: NonNegative[int] = 0


@schema.config()
class TrainConfig:
    """Settings of one training run; a second run with the same `output` resumes the first."""

    model: str | ModelConfig = "qwen2.5-0.5b"  # a preset's name, or a whole config
    # Hugging Face folder or native checkpoint; empty: random weights. Its own config then wins over
    # a preset named by `model`; a whole config there must have its shapes.
    init_from: str = ""
    output: str = ""  # folder of checkpoints, metrics and tokenizer; an existing run resumes
    num_steps: Positive[int] = 1000  # optimizer steps
    # Sequences per step, over all devices and micro-batches
    batch_size: Positive[int] = 8
    accumulate_steps: Positive[int] = 1  # micro-batches per step
    seed: NonNegative[int] = 0  # Seed of the initial weights
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Policy named in `configs/models/remat.py`, or tensors: "save:q,k,v offload:mlp_gate,mlp_up"
    remat: str = "full"
    layer_loop: Literal["scan", "unrolled"] = "scan"  # unrolled: faster on one GPU, slow to compile
    attention: Literal["auto", "reference", "cudnn", "splash"] = "auto"
    # Attention over sequences that mesh.context shards; the choice of auto is described in
    # qwen_jax/ops/attention/context_parallelism.py.
    context_parallel: Literal["auto", "ring", "all_gather", "ulysses"] = "auto"
    z_loss: NonNegative[float] = 0.0  # coefficient of mean(logsumexp(logits)^2)
    # Most tokens of a sequence (or of a device's shard of it) whose logits exist at one time
    loss_chunk: Positive[int] = 1024
    executables: str = ""  # a bundle of `qwen-jax plan --save`; empty: compile when the run starts
    log_every_steps: Positive[int] = 10
    eval_every_steps: Positive[int] = 200
    eval_batches: Positive[int] = 16
    profile_steps: tuple[int, int] | None = None  # first and last step of a profiler window
    # Stop when the loss exceeds this multiple of its running mean
    spike_factor: Annotated[float, Range(above=1)] = 3.0
    spike_patience: Positive[int] = 5  # Consecutive steps above spike_factor before the stop
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    experts: ExpertTrainingConfig = field(default_factory=ExpertTrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        schema.check(
            self.batch_size % self.accumulate_steps == 0,
            f"batch_size={self.batch_size} is not divisible by "
            f"accumulate_steps={self.accumulate_steps}",
        )
        remat.check(self.remat)
        schema.check(
            self.profile_steps is None or 1 <= self.profile_steps[0] <= self.profile_steps[1],
            f"profile_steps={self.profile_steps} must be a first and a last step, counted from 1",
        )
