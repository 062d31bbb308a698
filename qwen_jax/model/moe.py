"""Routed experts with a gated shared one (Qwen1.5-MoE, Qwen2-57B-A14B), their losses and bias.

y = sum_i w_i E_i(x) + sigmoid(x . w_gate) Shared(x), where w are the J largest of a softmax over
all experts, divided by their sum only where the model's `norm_topk_prob` says so.

J: experts chosen for each token (`num_experts_per_tok`). P: shards of a sequence's length.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from configs.models.architecture import ModelConfig, MoEConfig
from partitioning import expert_parallel, sharding
from partitioning.sharding import Layout
from qwen_jax.model import layers, module
from qwen_jax.ops.grouped_matmul import api as grouped_matmul
from qwen_jax.quant import array


@dataclass(frozen=True)
class Routing:
    """The dispatch of tokens: all of them, or at most `capacity_factor` even shares to an expert.

    real_BT: False for padding, which no expert gets and no statistic counts.
    """

    capacity_factor: float | None = None
    real_BT: jax.Array | None = None


@dataclass(frozen=True)
class Stats:
    """Router statistics of each shard of each sequence, as float32 sums over real tokens.

    Stacked over layers [L, ...] by the layer loop.
    """

    load_BPE: jax.Array  # tokens that chose each expert, dropped ones included
    probability_BPE: jax.Array
    squared_log_z_BP: jax.Array  # logsumexp(logits)^2
    entropy_BP: jax.Array  # of the softmax, nats
    dropped_BP: jax.Array  # choices dropped for lack of capacity
    tokens_BP: jax.Array


jax.tree_util.register_dataclass(Routing, ["real_BT"], ["capacity_factor"])
jax.tree_util.register_dataclass(
    Stats,
    ["load_BPE", "probability_BPE", "squared_log_z_BP", "entropy_BP", "dropped_BP", "tokens_BP"],
    [],
)


DROPLESS = Routing()


class Router(nnx.Module):
    """Router logits [E] of each token; float32, since rounding would decide near ties."""

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        D, E = cfg.hidden_size, cfg.moe.num_experts
        init = layers.normal(cfg.initializer_range)
        self.kernel = module.param(key, (D, E), axes=("embed", None), init=init)
        if cfg.moe.bias_update_rate is not None:
            zeros = lambda key, shape, dtype: jnp.zeros(shape, dtype)  # noqa: E731
            self.bias = module.param(key, (E,), axes=(None,), init=zeros)

    def __call__(self, x_BTD: jax.Array, *, layout: Layout | None) -> jax.Array:
        kernel_DE = self.kernel[...].astype(jnp.float32)
        # Replicated: left to itself, XLA's partitioner would split the small product again.
        kernel_DE = sharding.constrain(kernel_DE, ("act_embed", None), layout)
        logits_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),
            kernel_DE,
            precision=jax.lax.Precision.HIGHEST,
        )
        return sharding.constrain(logits_BTE, ("batch", "length", None), layout)


class Experts(nnx.Module):
    """E SwiGLU networks; experts that only pad their number are stored and never chosen."""

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        moe, init = cfg.moe, layers.normal(cfg.initializer_range)
        E, D, F = moe.num_held, cfg.hidden_size, moe.moe_intermediate_size
        keys = jax.random.split(key, 3)

        def linear(name: str, key: jax.Array, shape: tuple[int, ...]) -> layers.Linear:
            return layers.Linear(key, shape=shape, axes=EXPERT_AXES[name], init=init)

        self.gate = linear("gate", keys[0], (E, D, F))
        self.up = linear("up", keys[1], (E, D, F))
        self.down = linear("down", keys[2], (E, F, D))

    def kernels(self) -> dict[str, jax.Array | array.QuantArray]:
        """The three kernels by name."""
        return {name: getattr(self, name).kernel.get_value() for name in EXPERT_AXES}


EXPERT_AXES = {
    "gate": ("experts", "expert_embed", "ffn"),
    "up": ("experts", "expert_embed", "ffn"),
    "down": ("experts", "ffn", "expert_embed"),
}


class MoE(nnx.Module):
    """The feed-forward part of a layer with experts."""

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        keys = jax.random.split(key, 4)
        self.config = cfg.moe
        self.router = Router(keys[0], cfg)
        self.experts = Experts(keys[1], cfg)
        if cfg.moe.shared_expert_intermediate_size:
            self.make_shared(keys[2], cfg)
            # As small as a norm's scale, and like it on every device.
            self.shared_gate = layers.Linear(
                keys[3],
                shape=(cfg.hidden_size, 1),
                axes=("norm", None),
                init=layers.normal(cfg.initializer_range),
            )

    def make_shared(self, key: jax.Array, cfg: ModelConfig) -> None:
        """Declares the shared expert."""
        self.shared = layers.SwiGLU(
            key,
            size=cfg.hidden_size,
            hidden=cfg.moe.shared_expert_intermediate_size,
            init=layers.normal(cfg.initializer_range),
        )

    def __call__(
        self, x_BTD: jax.Array, *, layout: Layout | None, routing: Routing
    ) -> tuple[jax.Array, Stats]:
        moe = self.config
        logits_BTE = self.router(x_BTD, layout=layout)
        bias_E = None if moe.bias_update_rate is None else self.router.bias[...]
        weights_BTJ, experts_BTJ, stats = route(
            logits_BTE, moe, bias_E=bias_E, real_BT=routing.real_BT, layout=layout
        )
        if routing.real_BT is not None:
            experts_BTJ = jnp.where(routing.real_BT[..., None], experts_BTJ, moe.num_held)
        kernels, num_experts = self.experts.kernels(), moe.num_held
        if _gathers_chosen(kernels, experts_BTJ, routing=routing, layout=layout):
            kernels, experts_BTJ = _chosen(kernels, experts_BTJ)
            num_experts = experts_BTJ.size
        y_BTD, dropped_BP = expert_parallel.run(
            compute(layout),
            x_BTD,
            weights_BTJ.astype(x_BTD.dtype),
            experts_BTJ,
            {name: array.dequantised(k, dtype=x_BTD.dtype) for name, k in kernels.items()},
            num_experts=num_experts,
            capacity_factor=routing.capacity_factor,
            layout=layout,
        )
        stats = Stats(**{**vars(stats), "dropped_BP": dropped_BP})
        if moe.shared_expert_intermediate_size:
            gate_BT1 = jax.nn.sigmoid(self.shared_gate(x_BTD, "btd,dg->btg", layout=layout))
            y_BTD = y_BTD + gate_BT1 * self.shared(x_BTD, layout=layout)
        return y_BTD, stats


def route(
    logits_BTE: jax.Array,
    moe: MoEConfig,
    *,
    bias_E: jax.Array | None = None,
    real_BT: jax.Array | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array, Stats]:
    """Weights and experts [B, T, J], and statistics before anything is dropped; float32.

    A bias affects the choice alone, neither weights nor gradients.
    """
    E, J = moe.num_experts, moe.num_experts_per_tok
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    scores_BTE = jax.lax.stop_gradient(probabilities_BTE)
    if bias_E is not None:
        scores_BTE = scores_BTE + jax.lax.stop_gradient(bias_E)[None, None]
    experts_BTJ = top(scores_BTE, J)
    # By comparison rather than by index: no gather, and no scatter in the backward pass.
    chosen_BTJE = jax.nn.one_hot(experts_BTJ, E, dtype=bool)
    weights_BTJ = jnp.sum(jnp.where(chosen_BTJE, probabilities_BTE[:, :, None], 0.0), axis=-1)
    if moe.norm_topk_prob:
        weights_BTJ = weights_BTJ / jnp.sum(weights_BTJ, axis=-1, keepdims=True)
    stats = _statistics(logits_BTE, probabilities_BTE, chosen_BTJE, real_BT=real_BT, layout=layout)
    return weights_BTJ, experts_BTJ, stats


def top(scores: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` largest along the last dimension, largest first; ties: the first.

    Computed as `count` maxima, since a partitioner may not split a sort over the other dimensions.
    """
    found = []
    for _ in range(count):
        found.append(jnp.argmax(scores, axis=-1).astype(jnp.int32))
        taken = jax.nn.one_hot(found[-1], scores.shape[-1], dtype=bool)
        scores = jnp.where(taken, -jnp.inf, scores)
    return jnp.stack(found, axis=-1)


def _statistics(
    logits_BTE: jax.Array,
    probabilities_BTE: jax.Array,
    chosen_BTJE: jax.Array,
    *,
    real_BT: jax.Array | None,
    layout: Layout | None,
) -> Stats:
    """Statistics summed over each device's shard of a sequence, so without a collective."""
    B, T, _ = logits_BTE.shape
    P = 1 if layout is None else layout.size("length")
    real_BT1 = jnp.ones((1, 1, 1)) if real_BT is None else real_BT[..., None].astype(jnp.float32)

    def total(x_BTE: jax.Array) -> jax.Array:
        x_BTE = x_BTE * real_BT1
        return jnp.sum(x_BTE.reshape(B, P, T // P, x_BTE.shape[-1]), axis=2)

    log_z_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    entropy_BT1 = log_z_BT1 - jnp.sum(probabilities_BTE * logits_BTE, axis=-1, keepdims=True)
    return Stats(
        load_BPE=total(jnp.sum(chosen_BTJE, axis=2, dtype=jnp.float32)),
        probability_BPE=total(probabilities_BTE),
        squared_log_z_BP=total(log_z_BT1**2)[..., 0],
        entropy_BP=total(jax.lax.stop_gradient(entropy_BT1))[..., 0],
        dropped_BP=jnp.zeros((B, P), jnp.float32),
        tokens_BP=total(jnp.ones((B, T, 1)))[..., 0],
    )


def _gathers_chosen(
    kernels: dict, experts_BTJ: jax.Array, *, routing: Routing, layout: Layout | None
) -> bool:
    """Whether only the chosen experts' kernels are dequantised: fewer choices than experts.

    Grouped products take plain kernels, so quantised ones are dequantised first.
    """
    alone = layout is None or layout.mesh.size == 1
    fewer = experts_BTJ.size < kernels["gate"].shape[0] and routing.real_BT is None
    return alone and fewer and any(map(array.is_quantised, kernels.values()))


def _chosen(kernels: dict, experts_BTJ: jax.Array) -> tuple[dict, jax.Array]:
    """Kernels of the chosen experts, one for each choice in order, and each choice's index."""
    chosen = experts_BTJ.reshape(-1)
    kernels = jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), kernels)
    return kernels, jnp.arange(chosen.size, dtype=jnp.int32).reshape(experts_BTJ.shape)


def _grouped(
    kernels: dict, rows_RD: jax.Array, weights_R: jax.Array, sizes_E: jax.Array, *, platform: str
) -> jax.Array:
    product = functools.partial(grouped_matmul.grouped_matmul, platform=platform)
    rows_RD = checkpoint_name(rows_RD, "expert_rows")
    gate_RF = checkpoint_name(product(rows_RD, kernels["gate"], sizes_E), "expert_gate")
    up_RF = checkpoint_name(product(rows_RD, kernels["up"], sizes_E), "expert_up")
    # Weighted before the last product: the sum over choices then needs no row in its gradient.
    h_RF = jax.nn.silu(gate_RF) * up_RF * weights_R[:, None]
    return product(h_RF, kernels["down"], sizes_E)


def _batched(kernels: dict, rows_BECD: jax.Array, weights_BEC: jax.Array):
    rows_BECD = checkpoint_name(rows_BECD, "expert_rows")
    gate_BECF = jnp.einsum("becd,edf->becf", rows_BECD, kernels["gate"])
    up_BECF = jnp.einsum("becd,edf->becf", rows_BECD, kernels["up"])
    gate_BECF = checkpoint_name(gate_BECF, "expert_gate")
    up_BECF = checkpoint_name(up_BECF, "expert_up")
    h_BECF = jax.nn.silu(gate_BECF) * up_BECF * weights_BEC[..., None]
    return jnp.einsum("becf,efd->becd", h_BECF, kernels["down"])


def compute(layout: Layout | None) -> expert_parallel.Compute:
    """The experts' arithmetic for the devices of `layout`."""
    platform = sharding.platform(layout)
    grouped = functools.partial(_grouped, platform=platform)
    return expert_parallel.Compute(grouped=grouped, batched=_batched, axes=EXPERT_AXES)


@dataclass(frozen=True)
class Losses:
    """Router losses without coefficients, tokens per expert, and means to log."""

    balance: jax.Array
    z: jax.Array
    load_LE: jax.Array
    metrics: dict[str, jax.Array]

    def weighted(self, moe: MoEConfig) -> jax.Array:
        """The weighted sum of both losses, which is added to the loss of a token."""
        return moe.router_aux_loss_coef * self.balance + moe.router_z_loss * self.z


def losses(moe: MoEConfig, stats: Stats) -> Losses:
    """The router's losses from the statistics of all layers [L, B, P, ...].

    balance, over the global batch: E sum_e f_e p_e, where f_e is how often a token chooses expert e
    and p_e its mean probability, both over all tokens of all layers together (arXiv 2101.03961,
    equation 4, as transformers' `load_balancing_loss_func` generalises it). Over sequences: the
    same for each sequence and layer by itself, then their mean. An even load gives J in both.
    z: mean of logsumexp(logits)^2 (arXiv 2202.08906, equation 5).
    """
    E, J = moe.num_experts, moe.num_experts_per_tok
    tokens = jnp.sum(stats.tokens_BP)
    if moe.load_balance == "global_batch":
        f_E = jnp.sum(stats.load_BPE, axis=(0, 1, 2)) / tokens
        p_E = jnp.sum(stats.probability_BPE, axis=(0, 1, 2)) / tokens
        balance = E * jnp.sum(f_E * p_E)
    else:
        tokens_LB = jnp.sum(stats.tokens_BP, axis=2)
        load_LBE, probability_LBE = (
            jnp.sum(x, axis=2) for x in (stats.load_BPE, stats.probability_BPE)
        )
        # A row of padding alone has no load to balance.
        each_LB = jnp.sum(load_LBE * probability_LBE, axis=-1) / jnp.maximum(tokens_LB, 1.0) ** 2
        balance = E * jnp.sum(each_LB) / jnp.maximum(jnp.sum(tokens_LB > 0), 1)
    load_LE = jnp.sum(stats.load_BPE, axis=(1, 2))
    z = jnp.sum(stats.squared_log_z_BP) / tokens
    imbalance_L = jnp.max(load_LE, axis=1) / jnp.mean(load_LE, axis=1)
    metrics = {
        "router_balance": balance,
        "router_z": z,
        "router_imbalance": jnp.mean(imbalance_L),
        "router_imbalance_worst": jnp.max(imbalance_L),
        "router_entropy": jnp.sum(stats.entropy_BP) / tokens,
        "router_dropped": jnp.sum(stats.dropped_BP) / (tokens * J),
    }
    return Losses(balance, z, load_LE, metrics)


def with_updated_bias(params: dict, load_LE: jax.Array, *, rate: float) -> dict:
    """Parameters with router biases b + rate sign(mean load - load) (arXiv 2408.15664).

    `params` is a model's tree, `load_LE` the batch's tokens per expert before the update. Experts
    with more than the mean load are chosen less often afterwards.
    """
    error_LE = jnp.mean(load_LE, axis=1, keepdims=True) - load_LE
    layers = params["layers"]
    router = layers["moe"]["router"]
    router = {**router, "bias": router["bias"] + rate * jnp.sign(error_LE)}
    return {**params, "layers": {**layers, "moe": {**layers["moe"], "router": router}}}


def stays_float32(path: tuple) -> bool:
    """Whether a parameter, by its path of keys, stays in float32: the router's parameters do."""
    return any(getattr(key, "key", None) == "router" for key in path)
