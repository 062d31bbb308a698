"""Architecture of a model, and the settings beside its weights in a Hugging Face folder."""

import dataclasses
from typing import Annotated, Literal

from configs import schema
from configs.schema import NonNegative, Positive, Range


@schema.config(prefix="rope_scaling ")
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071, section 3; `rope_scaling` in config.json).

    `attention_factor=None` derives it: from `mscale` and `mscale_all_dim` where both are given,
    otherwise 0.1 ln(factor) + 1.
    """

    factor: Annotated[float, Range(min=1)]
    original_max_position_embeddings: Positive[int]
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@schema.config(prefix="dual_chunk_attention ")
class DualChunkConfig:
    """Dual chunk attention (arXiv 2402.17463). Equal to plain RoPE up to `chunk_size` tokens."""

    chunk_size: int
    local_size: int
    original_max_position_embeddings: Positive[int]

    def __post_init__(self) -> None:
        schema.check(
            0 < self.local_size < self.chunk_size,
            f"dual chunk attention needs 0 < local_size < chunk_size, got "
            f"local_size={self.local_size}, chunk_size={self.chunk_size}",
        )


@schema.config()
class MoEConfig:
    """Routed experts beside a gated shared one, in place of a layer's feed-forward network.

    y = sum_i w_i E_i(x) + sigmoid(x . w_gate) Shared(x), where w are the top-k of a softmax over
    all experts. The first fields carry config.json's names; those after `router_aux_loss_coef` are
    this project's own, and no Hugging Face file holds them.
    """

    num_experts: Positive[int]
    num_experts_per_tok: Positive[int]
    moe_intermediate_size: Positive[int]  # of one expert
    shared_expert_intermediate_size: NonNegative[int]  # 0: no shared expert
    norm_topk_prob: bool = False  # whether the k weights are made to sum to 1
    decoder_sparse_step: Positive[int] = 1  # every n-th layer has experts, the last of each n
    mlp_only_layers: tuple[int, ...] = ()  # layers without, whatever the step
    router_aux_loss_coef: NonNegative[float] = 0.001  # of the load-balance loss in training
    router_z_loss: NonNegative[float] = 0.0  # coefficient of mean(logsumexp(router logits)^2)
    # Over which tokens the load is to be even: the batch of a step (of a micro-batch, where it is
    # split), or each sequence by itself.
    load_balance: Literal["global_batch", "sequence"] = "global_batch"
    # A number adds a bias to each expert that steers the choice alone, moved by as much a step
    # against its load error (arXiv 2408.15664).
    bias_update_rate: Positive[float] | None = None
    # Most tokens of a sequence that an expert takes in training, as a multiple of its even share;
    # None drops nothing. Prefill and decoding never drop.
    capacity_factor: Positive[float] | None = None
    pad_experts_to: Positive[int] | None = None  # experts held, with ones that are never chosen

    def __post_init__(self) -> None:
        schema.check(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok={self.num_experts_per_tok} is more than "
            f"num_experts={self.num_experts}",
        )
        schema.check(
            self.pad_experts_to is None or self.pad_experts_to >= self.num_experts,
            f"pad_experts_to={self.pad_experts_to} is less than num_experts={self.num_experts}",
        )

    @property
    def num_held(self) -> int:
        """Experts that the parameters hold, padding included."""
        return self.pad_experts_to or self.num_experts

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer`, counted from 0, has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@schema.config(prefix="experts.")
class ExpertTrainingConfig:
    """Settings for training a model's experts; None keeps the value of the model's config."""

    router_aux_loss_coef: NonNegative[float] | None = None  # of the load-balance loss
    # Coefficient of mean(logsumexp(router logits)^2)
    router_z_loss: NonNegative[float] | None = None
    load_balance: Literal["global_batch", "sequence"] | None = None  # where load is to be even
    # Update rate of router biases that balance the choice of experts (arXiv 2408.15664)
    bias_update_rate: Positive[float] | None = None
    # An expert drops tokens beyond this multiple of its even share
    capacity_factor: Positive[float] | None = None
    # Number of experts after padding, for a mesh axis `expert` that does not divide their number
    pad_experts_to: Positive[int] | None = None

    def apply(self, model: "ModelConfig") -> "ModelConfig":
        """`model` trained this way. Raises `ValueError` for settings of a model without experts."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            return model
        schema.check(
            model.moe is not None, f"{model.name} has no experts: experts.{next(iter(given))}"
        )
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **given))


@schema.config()
class ModelConfig:
    """A Qwen2.5 transformer, dense or with experts; field names are those of its config.json."""

    name: str
    vocab_size: Positive[int]  # embedding rows, padding rows included
    hidden_size: Positive[int]
    intermediate_size: Positive[int]
    num_hidden_layers: Positive[int]
    num_attention_heads: Positive[int]
    num_key_value_heads: Positive[int]
    head_dim: Positive[int]
    max_position_embeddings: Positive[int]  # tokens
    rms_norm_eps: Positive[float] = 1e-6
    rope_theta: Positive[float] = 1e6
    rope_scaling: YarnConfig | None = None
    dual_chunk_attention: DualChunkConfig | None = None
    moe: MoEConfig | None = None
    tie_word_embeddings: bool = False
    initializer_range: Positive[float] = 0.02
    bos_token_id: int | None = 151643
    eos_token_ids: tuple[int, ...] = (151643,)
    pad_token_id: int | None = 151643

    def __post_init__(self) -> None:
        schema.check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        schema.check(
            self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs"
        )
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            schema.check(
                value is None or 0 <= value < self.vocab_size,
                f"{name}={value} is outside the vocabulary of {self.vocab_size} rows",
            )
        for value in self.eos_token_ids:
            schema.check(
                0 <= value < self.vocab_size,
                f"eos token id {value} is outside the vocabulary of {self.vocab_size} rows",
            )

        self._check_experts()

    def _check_experts(self) -> None:
        if self.moe is None:
            return
        outside = [i for i in self.moe.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        schema.check(
            not outside,
            f"mlp_only_layers {outside} are not among the {self.num_hidden_layers} layers",
        )
        schema.check(
            any(map(self.moe.has_experts, range(self.num_hidden_layers))),
            f"no layer has experts with decoder_sparse_step={self.moe.decoder_sparse_step} and "
            f"mlp_only_layers={self.moe.mlp_only_layers}; use a model without moe",
        )

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        layers = range(self.num_hidden_layers)
        return tuple(i for i in layers if self.moe is not None and self.moe.has_experts(i))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers that have a plain feed-forward network."""
        return tuple(sorted(set(range(self.num_hidden_layers)) - set(self.sparse_layers)))

    @property
    def num_query_groups(self) -> int:
        """Query heads that share one key-value head (G = N / K)."""
        return self.num_attention_heads // self.num_key_value_heads


@schema.config()
class QuantisationConfig:
    """How a Hugging Face checkpoint is quantised; its kernels are whole numbers of `bits` bits.

    symmetric: every zero point is the middle of the range. ordered: inputs were quantised, and so
    grouped, in another order (GPTQ's `desc_act`).
    """

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int | None  # inputs that share a scale; None: all
    symmetric: bool
    ordered: bool = False

    def __post_init__(self) -> None:
        known = (4, 8) if self.method == "gptq" else (4,)
        schema.check(
            self.bits in known,
            f"{self.method} with bits={self.bits} is not supported; use one of {known}",
        )
        schema.check(
            self.group_size is None or (self.group_size > 0 and self.group_size % 32 == 0),
            f"{self.method} with group_size={self.group_size} is not supported; use a multiple of "
            f"32, or -1",
        )


def model_from_dict(values: dict) -> ModelConfig:
    """The model that `schema.to_dict` wrote. Unknown keys raise `ValueError` by name."""
    values = dict(values)
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    schema.check(not unknown, f"unknown model config keys {unknown}; known: {sorted(known)}")
    if values.get("moe") is not None:  # JSON has no tuples
        without_experts = tuple(values["moe"].get("mlp_only_layers", ()))
        values["moe"] = {**values["moe"], "mlp_only_layers": without_experts}
    kinds = {
        "rope_scaling": YarnConfig,
        "dual_chunk_attention": DualChunkConfig,
        "moe": MoEConfig,
    }
    for name, kind in kinds.items():
        if values.get(name) is not None:
            values[name] = kind(**values[name])
    values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
    return ModelConfig(**values)


@schema.config()
class GenerationConfig:
    """Sampling defaults that come with a checkpoint (generation_config.json); None: not said."""

    do_sample: bool | None = None
    temperature: NonNegative[float] | None = None
    top_k: NonNegative[int] | None = None
    top_p: Annotated[float, Range(above=0, max=1, remedy="use 1 to keep all tokens")] | None = None
    min_p: Annotated[float, Range(min=0, max=1)] | None = None
    repetition_penalty: Annotated[float, Range(above=0, remedy="use 1 for none")] | None = None
    max_new_tokens: Positive[int] | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
