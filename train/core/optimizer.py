"""AdamW on float32 masters, its learning-rate schedules, and which parameters decay."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from configs.optimizer import OptimizerConfig
from partitioning import sharding
from partitioning.sharding import Axes

Schedule = Callable[[int], float]


def schedule(config: OptimizerConfig, *, num_steps: int) -> Schedule:
    """Learning rate of update n, counted from 0; computed on the host, and an input of the step.

    All begin with a linear warm-up, peak (n + 1) / warmup_steps, and then hold the peak
    (`constant`), follow a half cosine down to `final_learning_rate_fraction` at `num_steps`
    (`cosine`, arXiv 1608.03983), or hold the peak and fall linearly over the last `decay_steps`
    (`wsd`, arXiv 2404.06395). Past `num_steps` the final value stays.
    Raises `ValueError` if the stretches do not fit into `num_steps`.
    """
    warmup, decay = config.warmup_steps, config.decay_steps
    _check_stretches(config, num_steps)
    final = config.final_learning_rate_fraction
    start = num_steps - decay if config.schedule == "wsd" else warmup

    def rate(count: int) -> float:
        ramp = min(1.0, (count + 1) / max(warmup, 1))
        if config.schedule == "constant":
            return config.peak_learning_rate * ramp
        progress = min(max((count - start) / (num_steps - start), 0.0), 1.0)
        if config.schedule == "cosine":
            progress = 0.5 * (1.0 - math.cos(math.pi * progress))
        return config.peak_learning_rate * ramp * (1.0 - (1.0 - final) * progress)

    return rate


def _check_stretches(config: OptimizerConfig, num_steps: int) -> None:
    if config.schedule == "cosine" and config.warmup_steps >= num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps} leaves nothing of num_steps={num_steps} "
            f"for the cosine; use fewer warm-up steps"
        )
    if config.schedule == "wsd" and config.warmup_steps + config.decay_steps > num_steps:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps} and "
            f"optimizer.decay_steps={config.decay_steps} together exceed num_steps={num_steps}; "
            f"shorten one of them"
        )


def decays(axes: Axes) -> bool:
    """Whether weight decay acts on a parameter with these logical axes.

    Matrices and embeddings join the residual stream (`embed`, in an expert `expert_embed`) to
    something else. Norm scales and biases, although those of q, k and v have two dimensions, do not
    have it.
    """
    own = [axis for axis in axes if axis != "layers"]
    return len(own) > 1 and ("embed" in own or "expert_embed" in own)


def make(config: OptimizerConfig, *, axes: dict) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, Adam, decoupled weight decay; not yet times the learning rate.

    `axes` is the tree of logical axes of the parameters. The first moment is kept in
    `moment_dtype`, the second in float32.
    """
    mask = jax.tree.map(decays, axes, is_leaf=sharding.is_axes)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(
            b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
        ),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
    )
