"""One optimizer step as a pure, jitted function of the state and a batch, for every recipe.

`make` builds the program of a run: how its state starts, the step, and the held-out evaluation.
A recipe hands in its loss; `next_token_loss` is that of pre-training and fine-tuning.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.model import moe, transformer
from qwen_jax.ops.attention import context_parallelism
from train.core import optimizer as optimizer_lib
from train.losses import language_model

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class State:
    """Training state that a step changes. `step`: number of updates applied so far, int32."""

    step: jax.Array
    params: dict
    optimizer: optax.OptState


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of a batch that a loss returns, and the total weight of the tokens.

    Sums of micro-batches add up to those of their batch, so dividing by `weight` at the end gives
    the same mean however a batch is split. A router's losses and metrics are means already, and
    enter times the weight: over a split batch, the mean of each micro-batch's own. For z-loss and
    the balance of sequences that is the whole batch's, where micro-batches have as many tokens; the
    balance of the global batch is that of the micro-batch.

    router_load_LE: tokens that chose each expert, where the model has experts.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    router_load_LE: jax.Array | None = None


jax.tree_util.register_dataclass(State, ["step", "params", "optimizer"], [])
jax.tree_util.register_dataclass(Sums, ["loss", "weight", "metrics", "router_load_LE"], [])

Loss = Callable[[dict, Batch], Sums]


@dataclass(frozen=True)
class Program:
    """The jitted functions of a run.

    init: key -> State, born sharded.            adopt: parameters -> State, fresh optimizer.
    step: State (donated), batch, learning rate -> State, metrics.
    evaluate: parameters, batch -> Sums.    param_norm: parameters -> their global norm.
    learning_rate: number of updates so far -> that of the next, a scalar on every device.
    state: shapes, dtypes and shardings of the state.   batch: those of a batch.
    """

    init: Callable[[jax.Array], State]
    adopt: Callable[[dict], State]
    step: Callable[[State, Batch, jax.Array], tuple[State, dict[str, jax.Array]]]
    evaluate: Callable[[dict, Batch], Sums]
    param_norm: Callable[[dict], jax.Array]
    learning_rate: Callable[[int], jax.Array]
    state: State
    batch: Batch

    @property
    def inputs(self) -> tuple[State, Batch, jax.ShapeDtypeStruct]:
        """Arguments of `step` as shapes, dtypes and shardings, enough to lower and compile it."""
        replicated = NamedSharding(self.batch_sharding.mesh, PartitionSpec())
        return self.state, self.batch, jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding of every array [B, T] of a batch."""
        return self.batch["tokens"].sharding


def next_token_loss(cfg: ModelConfig, config: TrainConfig, layout: Layout) -> Loss:
    """Cross-entropy of `targets` under `tokens`, weighted by `loss_weights`; packed rows."""
    variant = context_parallelism.choose(
        config.context_parallel, length=config.data.sequence_length, layout=layout
    )

    def loss(params: dict, batch: Batch) -> Sums:
        # A sum over tokens does not depend on their order, so the order is not restored.
        batch = jax.tree.map(
            lambda x: context_parallelism.arrange(x, variant, layout=layout), batch
        )
        output = transformer.apply(
            cfg,
            params,
            batch["tokens"],
            positions_BT=batch["positions"],
            segment_ids_BT=batch["segment_ids"],
            dtype=jnp.dtype(config.compute_dtype),
            attention=None if config.attention == "auto" else config.attention,
            context_parallel=variant,
            remat_policy=config.remat,
            layer_loop=config.layer_loop,
            layout=layout,
        )
        sums = language_model.cross_entropy(
            output.hidden_BTD,
            transformer.output_kernel(cfg, params),
            batch["targets"],
            batch["loss_weights"],
            z_loss=config.z_loss,
            chunk=config.loss_chunk,
            layout=layout,
        )
        metrics = {"cross_entropy": sums.cross_entropy, "accuracy": sums.num_correct}
        return with_router(Sums(sums.loss, sums.weight, metrics), cfg, output)

    return loss


def with_router(sums: Sums, cfg: ModelConfig, output: transformer.Output) -> Sums:
    """`sums` with the router's losses and metrics added; unchanged for a model without experts."""
    if output.router is None:
        return sums
    router = moe.losses(cfg.moe, output.router)
    metrics = {name: value * sums.weight for name, value in router.metrics.items()}
    return Sums(
        sums.loss + sums.weight * router.weighted(cfg.moe),
        sums.weight,
        sums.metrics | metrics,
        router.load_LE,
    )


def make(
    cfg: ModelConfig, config: TrainConfig, layout: Layout, *, loss: Loss | None = None
) -> Program:
    """The program of a run of `cfg` under `config`; `loss` defaults to `next_token_loss`.

    Raises `ValueError` if model or batch do not divide over the mesh, or if the schedule does not
    fit; nothing is compiled or allocated before the functions are called.
    """
    sharding.check_model(cfg, layout)
    check_batch(config, layout)
    loss = next_token_loss(cfg, config, layout) if loss is None else loss
    axes = transformer.axes(cfg)
    tx = optimizer_lib.make(config.optimizer, axes=axes)
    schedule = optimizer_lib.schedule(config.optimizer, num_steps=config.num_steps)
    state = _abstract_state(cfg, tx, axes, layout)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    dtype = jnp.dtype(config.compute_dtype)

    def adopt(params: dict) -> State:
        return State(jnp.zeros((), jnp.int32), params, tx.init(params))

    step = functools.partial(
        train_step,
        bias_update_rate=None if cfg.moe is None else cfg.moe.bias_update_rate,
        loss=loss,
        tx=tx,
        dtype=dtype,
        parts=config.accumulate_steps,
        layout=layout,
        param_shardings=shardings.params,
    )

    def learning_rate(count: int) -> jax.Array:
        value = np.float32(schedule(count))
        return jax.make_array_from_callback((), replicated, lambda _: value)

    return Program(
        init=jax.jit(lambda key: adopt(transformer.init(cfg, key)), out_shardings=shardings),
        adopt=jax.jit(adopt, out_shardings=shardings, donate_argnums=0),
        step=jax.jit(step, out_shardings=(shardings, replicated), donate_argnums=0),
        evaluate=jax.jit(
            lambda params, batch: loss(compute_copy(params, dtype), batch),
            out_shardings=replicated,
        ),
        param_norm=jax.jit(optax.tree.norm, out_shardings=replicated),
        learning_rate=learning_rate,
        state=state,
        batch=_abstract_batch(config, layout),
    )


def train_step(
    state: State,
    batch: Batch,
    learning_rate: jax.Array,
    *,
    loss: Loss,
    tx: optax.GradientTransformationExtraArgs,
    dtype: jnp.dtype,
    parts: int,
    layout: Layout,
    param_shardings: dict,
    bias_update_rate: float | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """The state after one update on `batch`, and the step's metrics as float32 scalars.

    The learning rate is an input, so that one compiled step serves every schedule.

    The batch is taken in `parts` micro-batches; losses and gradients are sums over tokens divided
    by the whole batch's weight. A router's biases move by `bias_update_rate`. Where the loss or the
    gradient is not finite, the state stays as it was and the metric `finite` is 0.
    """
    copy = compute_copy(state.params, dtype)
    gradients, sums = _gradients(loss, copy, batch, parts, layout, param_shardings)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) / sums.weight, gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)

    updates, moments = tx.update(gradients, state.optimizer, state.params)
    updates = jax.tree.map(lambda update: -learning_rate * update, updates)
    params = optax.apply_updates(state.params, updates)
    if bias_update_rate is not None:
        params = moe.with_updated_bias(params, sums.router_load_LE, rate=bias_update_rate)
    updated = State(state.step + 1, params, moments)
    # A select, not a branch: it fuses into the update, without a round trip to the host.
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), updated, state)
    metrics = {
        "loss": sums.loss / sums.weight,
        **{name: value / sums.weight for name, value in sums.metrics.items()},
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "tokens": sums.weight,
        "finite": finite,
    }
    return new, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def compute_copy(params: dict, dtype: jnp.dtype) -> dict:
    """`params` with the stacked layers in the arithmetic's dtype.

    The layers cast their parameters where they use them. Cast here, once a step, micro-batches and
    the backward pass share the copy, and FSDP gathers half the bytes. Embedding, final norm and
    output projection stay float32, because the gradients of large sums over tokens end there, and
    so does a router, whose choices a rounding would change.
    """

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x if moe.stays_float32(path) else x.astype(dtype)

    stacks = {name: params[name] for name in ("layers", "dense_layers") if name in params}
    return {**params, **jax.tree_util.tree_map_with_path(cast, stacks)}


def check_batch(config: TrainConfig, layout: Layout) -> None:
    """Raises `ValueError` unless every micro-batch spreads evenly over the devices."""
    shards, part = layout.size("batch"), config.batch_size // config.accumulate_steps
    if part % shards:
        mesh_axes = "*".join(layout.rules.mesh_axes("batch"))
        raise ValueError(
            f"a micro-batch of {part} sequences (batch_size={config.batch_size} / "
            f"accumulate_steps={config.accumulate_steps}) does not divide over mesh axes "
            f"{mesh_axes}={shards}; use a batch_size that is a multiple of "
            f"{shards * config.accumulate_steps}"
        )
    context_parallelism.choose(
        config.context_parallel, length=config.data.sequence_length, layout=layout
    )


def _abstract_state(cfg, tx, axes: dict, layout: Layout) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings; moments lie as their parameters do."""
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    placed = sharding.shardings(axes, layout)
    params = jax.tree.map(place, transformer.shapes(cfg), placed)
    moments = optax.tree.map_params(
        tx,
        place,
        jax.eval_shape(tx.init, params),
        placed,
        transform_non_params=lambda leaf: place(leaf, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return State(step, params, moments)


def _abstract_batch(config: TrainConfig, layout: Layout) -> Batch:
    shape = (config.batch_size, config.data.sequence_length)
    placed = sharding.sharding(("batch", "length"), layout)
    whole = ("tokens", "targets", "segment_ids", "positions")
    dtypes = dict.fromkeys(whole, jnp.int32) | {"loss_weights": jnp.float32}
    return {n: jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for n, dtype in dtypes.items()}


def _gradients(loss: Loss, params: dict, batch: Batch, parts: int, layout, param_shardings):
    """Gradients of the loss sum, and the sums, over all micro-batches."""

    def objective(params: dict, batch: Batch) -> tuple[jax.Array, Sums]:
        sums = loss(params, batch)
        return sums.loss, sums

    differentiate = jax.grad(objective, has_aux=True)
    if parts == 1:
        return differentiate(params, batch)

    def add(total, part: Batch):
        new = differentiate(params, part)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

    batches = {name: _split(rows, parts, layout) for name, rows in batch.items()}
    first = {name: rows[0] for name, rows in batches.items()}
    zeros = lambda leaf: jnp.zeros(leaf.shape, jnp.float32)  # noqa: E731
    gradients, sums = jax.tree.map(zeros, jax.eval_shape(differentiate, params, first))
    gradients = jax.lax.with_sharding_constraint(gradients, param_shardings)
    return jax.lax.scan(add, (gradients, sums), batches)[0]


def _split(rows: jax.Array, parts: int, layout: Layout) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...].

    Micro-batch i takes rows i, i + parts, ...: every device splits the rows it has.
    """
    split = jnp.swapaxes(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 0, 1)
    return sharding.constrain(split, (None, "batch", "length"), layout)
