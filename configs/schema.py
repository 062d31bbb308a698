"""Every configuration of the project: frozen, keyword-only dataclasses that check themselves.

Model fields carry Hugging Face's names (`configs/huggingface.py` maps the files). Units are in the
names or in the comments: lengths are tokens, sizes are elements, times are seconds.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from configs import remat
from configs.architecture import (
    DualChunkAttention,
    Experts,
    Model,
    MoE,
    Quantisation,
    Yarn,
    model_from_dict,
    to_dict,
)
from configs.architecture import check as _check
from configs.architecture import check_positive as _check_positive

__all__ = [
    "DualChunkAttention", "Experts", "MoE", "Model", "Quantisation", "Yarn", "model_from_dict",
    "to_dict",
]  # fmt: skip

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sampling defaults that come with a checkpoint (generation_config.json); None: not said."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, None), ("top_k", 0, None), ("top_p", 0, 1), ("min_p", 0, 1),
            ("repetition_penalty", 0, None), ("max_new_tokens", 1, None),
        ):  # fmt: skip
            value = getattr(self, name)
            _check(
                value is None or (value >= low and (high is None or value <= high)),
                f"{name}={value} must be at least {low}" + (f", at most {high}" if high else ""),
            )
        _check(self.top_p != 0, "top_p=0 would leave no token; use 1 to keep all")
        _check(self.repetition_penalty != 0, "repetition_penalty=0 divides by zero; use 1 for none")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices per mesh axis inside a slice (ICI) and across slices (DCN); -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    dcn_data: int = 1  # slices over which whole replicas are spread
    kv_heads: Literal["sharded", "replicated"] = "sharded"  # over `tensor`, or on every device

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            _check(size == -1 or size > 0, f"mesh axis {axis}={size} must be positive, or -1")
        _check(
            list(sizes.values()).count(-1) <= 1,
            f"only one mesh axis may be -1 (take what is left), got {sizes}",
        )
        _check_positive(self, "dcn_data")
        _check(
            self.kv_heads in ("sharded", "replicated"),
            f"mesh kv_heads={self.kv_heads!r} must be sharded or replicated",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Local text and how it becomes batches.

    A path is a file or a folder (searched recursively): .jsonl and .parquet rows give `text_field`;
    any other file of `text_suffixes` is one document.
    """

    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # one per path: shares of documents drawn; empty: by size
    eval_paths: tuple[str, ...] = ()  # empty: `eval_fraction` of the documents is held out
    eval_fraction: float = 0.02
    tokenizer: str = ""  # folder with tokenizer files, a .tiktoken rank file or a .model
    text_field: str = "text"
    text_suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    sequence_length: int = 4096  # tokens a row
    seed: int = 0
    shuffle: bool = True
    worker_count: int = 0  # Grain worker processes; 0 reads in the training process
    prefetch: int = 16  # rows read ahead

    def __post_init__(self) -> None:
        _check_positive(self, "sequence_length", "prefetch")
        _check(
            self.worker_count >= 0, f"data.worker_count={self.worker_count} must not be negative"
        )
        _check(
            not self.weights or len(self.weights) == len(self.paths),
            f"data.weights has {len(self.weights)} entries for {len(self.paths)} paths; "
            f"give one per path, or none",
        )
        for weight in self.weights:
            _check(weight > 0, f"data.weights entry {weight} must be greater than 0")
        _check(
            0 <= self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction} must be in [0, 1)",
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
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
        _check_positive(self, "peak_learning_rate", "eps", "clip_norm")
        for name in ("b1", "b2"):
            _check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)")
        _check(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps} must not be negative")
        _check(
            self.schedule != "wsd" or self.decay_steps > 0,
            "optimizer.schedule=wsd needs optimizer.decay_steps greater than 0",
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When training state is saved and how much of it is kept."""

    every_steps: int = 500
    keep: int = 3  # newest checkpoints kept
    keep_every_steps: int = 0  # steps divisible by it are kept for ever; 0: none

    def __post_init__(self) -> None:
        _check_positive(self, "every_steps", "keep")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a run, one a host: how they find each other, how long they wait."""

    # single: one process. auto: ask Cloud TPU, GKE, Slurm, Open MPI or Kubernetes. explicit: below,
    # or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    launch: Literal["single", "auto", "explicit"] = "single"
    coordinator: str = ""  # HOST:PORT of process 0, as the others reach it
    num_processes: int = 0  # 0: not said
    process_id: int = -1  # of this process, from 0; -1: not said
    start_seconds: int = 300  # for all processes to come, and for each step of the start
    silence_seconds: int = 60  # without a sign of life a process counts as lost
    stall_seconds: int = 1800  # longest for a training step, an evaluation, a save, a compilation

    def __post_init__(self) -> None:
        _check_positive(self, "start_seconds", "silence_seconds", "stall_seconds")
        given = self.coordinator or self.num_processes or self.process_id >= 0
        _check(
            self.launch != "single" or not given,
            "cluster.coordinator, num_processes and process_id have no effect with "
            "cluster.launch=single; use explicit, or auto to find the rest",
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """One training run. `output` is its home: run again with the same one, it goes on."""

    model: str | Model = "qwen2.5-0.5b"  # a preset's name, or a whole config
    # Hugging Face folder or native checkpoint; empty: random weights. Its own config then wins over
    # a preset named by `model`; a whole config there must have its shapes.
    init_from: str = ""
    output: str = ""  # the run's home: checkpoints, metrics, tokenizer; run again, it goes on
    num_steps: int = 1000  # optimizer steps
    batch_size: int = 8  # sequences a step, over all devices, accumulation included
    accumulate_steps: int = 1  # parts into which the batch of a step is split
    seed: int = 0  # of the initial weights
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: str = "full"  # a name of `configs/remat.py`, or "save:q,k,v offload:mlp_gate,mlp_up"
    layer_loop: Literal["scan", "unrolled"] = "scan"  # unrolled: faster on one GPU, slow to compile
    attention: Literal["auto", "reference", "cudnn", "splash"] = "auto"
    # How rows spread over mesh.context meet in attention; auto: see qwen_jax/attention/context.py.
    context_parallel: Literal["auto", "ring", "all_gather", "ulysses"] = "auto"
    z_loss: float = 0.0
    loss_chunk: int = 1024  # at most so many tokens of a sequence (or part) have logits
    executables: str = ""  # a bundle of `qwen-jax plan --save`; empty: compile when the run starts
    log_every_steps: int = 10
    eval_every_steps: int = 200
    eval_batches: int = 16
    profile_steps: tuple[int, int] | None = None  # first and last step of a profiler window
    spike_factor: float = 3.0  # stop when the loss exceeds this multiple of its running mean
    spike_patience: int = 5  # ... in so many steps running
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    experts: Experts = field(default_factory=Experts)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        _check_positive(
            self, "num_steps", "batch_size", "accumulate_steps", "loss_chunk", "log_every_steps",
            "eval_every_steps", "eval_batches", "spike_patience",
        )  # fmt: skip
        _check(
            self.batch_size % self.accumulate_steps == 0,
            f"batch_size={self.batch_size} is not divisible by "
            f"accumulate_steps={self.accumulate_steps}",
        )
        remat.check(self.remat)
        _check(self.spike_factor > 1, f"spike_factor={self.spike_factor} must be greater than 1")
        _check(self.z_loss >= 0, f"z_loss={self.z_loss} must not be negative")
        _check(
            self.profile_steps is None or 1 <= self.profile_steps[0] <= self.profile_steps[1],
            f"profile_steps={self.profile_steps} must be a first and a last step, counted from 1",
        )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request's tokens are drawn. The defaults sample from the model's own distribution.

    Applied in this order: logit bias, min_tokens, a grammar's mask, penalties, temperature, top-k,
    top-p, min-p.
    """

    max_tokens: int = 512  # most tokens to generate, the closing one included
    min_tokens: int = 0  # the answer may not end before it has so many
    temperature: float = 1.0  # 0 is greedy: the likeliest token, always
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides the scores of tokens seen in prompt and answer
    presence_penalty: float = 0.0  # taken from the scores of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each time that they occur
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its score)
    stop_token_ids: tuple[int, ...] = ()  # end the answer too
    ignore_eos: bool = False  # end at max_tokens alone (and stop tokens)
    logprobs: int | None = None  # the answer's, with so many of the likeliest; None: none at all
    prompt_logprobs: int | None = None  # the prompt's; allows max_tokens=0, which only scores
    seed: int = 0  # same seed, same request: same tokens, whatever else is in the batch

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type not in (int, float):
                continue
            kinds = int if f.type is int else (int, float)
            _check(
                isinstance(value, kinds) and not isinstance(value, bool),
                f"{f.name}={value!r} must be {'a whole' if kinds is int else 'a'} number",
            )
        least = 1 if self.prompt_logprobs is None else 0
        _check(
            self.max_tokens >= least,
            f"max_tokens={self.max_tokens} must be at least 1, or 0 with prompt_logprobs",
        )
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} must be in [0, max_tokens={self.max_tokens}]",
        )
        _check(
            0 <= self.temperature < math.inf,
            f"temperature={self.temperature} must be 0 (greedy) or greater, and finite",
        )
        _check(self.top_k >= 0, f"top_k={self.top_k} must be 0 (all tokens) or greater")
        _check(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        _check(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")
        _check(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty={self.repetition_penalty} must be greater than 0 and finite",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(-2 <= value <= 2, f"{name}={value} must be in [-2, 2]")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(
                value is None or 0 <= value <= MOST_LOGPROBS,
                f"{name}={value} must be in [0, {MOST_LOGPROBS}]",
            )
        _check(
            len(self.logit_bias) <= MOST_BIASES,
            f"logit_bias has {len(self.logit_bias)} tokens; at most {MOST_BIASES} are taken",
        )
        for token, bias in self.logit_bias:
            _check(
                math.isfinite(bias),
                f"logit_bias={bias} of token {token} must be finite; -100 keeps a token out",
            )
        _check(
            len(self.stop_token_ids) <= MOST_STOPS,
            f"stop_token_ids has {len(self.stop_token_ids)} tokens; at most {MOST_STOPS} are taken",
        )
        _check(0 <= self.seed < 2**32, f"seed={self.seed} must be in [0, 2**32)")


MOST_LOGPROBS = 20  # likeliest tokens that one logprob can bring along, as in OpenAI's API
MOST_BIASES = 300  # as in OpenAI's API
MOST_STOPS = 16  # stop_token_ids of one request


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a batch inference engine shares one model among its requests."""

    num_slots: int = 256  # requests that decode at one time
    page_size: int = 64  # positions of keys and values that are given out together
    num_pages: int = 0  # 0: as many as the device's memory holds
    kv_cache: Literal["plain", "int8"] = "plain"  # int8: half the bytes of bfloat16, 0.8% off
    memory_fraction: float = 0.9  # of a device's memory, for parameters, pages and all else
    max_length: int = 0  # tokens of prompt and answer together; 0: as many as the model reads
    prefill_chunk: int = 2048  # most tokens of one prompt that are read at one time
    prefill_tokens: int = 8192  # most tokens of all prompts that are read at one time
    decode_steps: int = 8  # tokens a request draws before the host looks
    prefill_rounds: int = 1  # prefill_tokens that those who decode may wait for, so many times
    # Guesses of tokens, checked in one pass: copied from the text so far, or a smaller model's.
    speculation: Literal["off", "prompt_lookup", "draft"] = "off"
    guesses: int = 4  # tokens guessed at one time
    speculation_rows: int = 8  # most requests that decode at one time for which guessing may pay
    prefix_cache: Literal["on", "off"] = "on"  # prompts that begin alike are read once
    policy: Literal["fair", "longest_first"] = "fair"
    # Shapes of the device's programs: a few of each, or one, so that neighbours never change it.
    buckets: Literal["few", "one"] = "few"

    def __post_init__(self) -> None:
        _check_positive(
            self, "num_slots", "page_size", "prefill_chunk", "prefill_tokens", "decode_steps",
            "prefill_rounds", "guesses", "speculation_rows",
        )  # fmt: skip
        for name in ("num_pages", "max_length"):
            value = getattr(self, name)
            _check(value >= 0, f"{name}={value} must be 0 or greater")
        _check(
            0 < self.memory_fraction < 1,
            f"memory_fraction={self.memory_fraction} must be in (0, 1)",
        )
        _check(
            self.prefill_chunk % self.page_size == 0,
            f"prefill_chunk={self.prefill_chunk} must be a multiple of page_size={self.page_size}",
        )
        _check(
            self.prefill_tokens >= self.prefill_chunk,
            f"prefill_tokens={self.prefill_tokens} must be at least "
            f"prefill_chunk={self.prefill_chunk}",
        )
        _check(
            self.kv_cache in ("plain", "int8"),
            f"kv_cache={self.kv_cache!r} is unknown; known: plain, int8",
        )
        _check(
            self.speculation in ("off", "prompt_lookup", "draft"),
            f"speculation={self.speculation!r} is unknown; known: off, prompt_lookup, draft",
        )
        _check(self.prefix_cache in ("on", "off"), f"prefix_cache={self.prefix_cache!r}: on or off")
        _check(
            self.policy in ("fair", "longest_first"),
            f"policy={self.policy!r} is unknown; known: fair, longest_first",
        )
        _check(
            self.buckets in ("few", "one"), f"buckets={self.buckets!r} is unknown; known: few, one"
        )


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """A config's nested dict with dotted names: `{"mesh": {"fsdp": 2}}` -> `{"mesh.fsdp": 2}`."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
