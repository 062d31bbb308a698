"""Decoding over an explicit cache: `prefill`, `decode_step`, and several steps in one dispatch.

`prefill` and `decode_step` are pure and know nothing of sampling. `start` and `advance` are the
jitted programs that a generation loop calls: they sample on the device, so that the host neither
waits for a token nor shows between two steps.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from configs import schema
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax import fused, kv_cache, model, moe, rope, sampling, stack
from qwen_jax.attention import api, cached
from qwen_jax.quant import array

Form = Literal["stacked", "unstacked", "fused"]

PAD = -1  # in token outputs: the row had ended

# Programs traced so far, by name and shape: a bucket that is used again adds nothing.
compilations: collections.Counter[str] = collections.Counter()


def best_form(layout: Layout | None = None, *, params: dict | None = None) -> Form:
    """The form that decodes fastest on this platform and mesh, and that these parameters can have.

    TPUs read slices of stacked layers in place. Where query heads are spread over devices and kv
    heads are not, a fused kernel would have to be on every device too. Quantised kernels can be
    fused if they are quantised alike, and their inputs are in order.
    """
    if jax.default_backend() == "tpu":
        return "stacked"
    if layout is not None and layout.size("kv_heads") != layout.size("heads"):
        return "unstacked"
    stacks = [] if params is None else [params[name] for name in params if "layers" in name]
    if not all(fused.can_fuse(part) for part in stacks):
        return "unstacked"
    return "fused"


def prepare(
    cfg: schema.Model,
    params: dict,
    *,
    dtype: jnp.dtype,
    form: Form = "fused",
    layout: Layout | None = None,
) -> dict:
    """Stacked or unstacked parameters, cast and in the form asked for. Deletes their old arrays.

    stacked: as the model makes them. unstacked: a tuple of layers. fused: that, with q, k, v in one
    kernel and gate, up in another. Peak memory is the parameters and a copy of the largest leaf.
    """
    if form not in ("stacked", "unstacked", "fused"):
        raise ValueError(f"unknown form {form!r}; known: stacked, unstacked, fused")
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x if _stays(path, x) else _cast(x, dtype=jnp.dtype(dtype)),
        params,
        is_leaf=array.is_quantised,
    )
    if form == "stacked":
        return params
    if not isinstance(params["layers"], tuple):
        params = unstack(cfg, params)
    if form == "unstacked":
        return params
    fuse, layers = {}, []
    for name, layer in zip(stack.order(cfg), params["layers"], strict=True):
        if name not in fuse:
            fuse[name] = _fuse(cfg, name, layer, layout=layout)
        layers.append(jax.block_until_ready(fuse[name](layer)))
        _delete(layer)
    return {**params, "layers": tuple(layers)}


def _fuse(cfg: schema.Model, name: str, layer: dict, *, layout: Layout | None) -> Callable:
    """The program that fuses layers of this stack, of which `layer` is one."""
    function = functools.partial(fused.fuse, cfg)
    if layout is None:
        return jax.jit(function)
    axes = fused.parts(cfg)[name].axes()
    axes = jax.tree.map(lambda axes: axes[1:], axes, is_leaf=sharding.is_axes)
    placed = array.shardings(sharding.shardings(axes, layout), jax.eval_shape(function, layer))
    return jax.jit(function, out_shardings=placed)


def unstack(cfg: schema.Model, params: dict) -> dict:
    """`params` with a tuple of per-layer dicts. Consumes the stacked arrays, leaf by leaf."""

    def apart(stacked: dict) -> list[dict]:
        leaves, tree = jax.tree.flatten(stacked)
        columns = []
        for leaf in leaves:
            columns.append(jax.block_until_ready(_split(leaf)))
            _delete(leaf)
        return [tree.unflatten(column) for column in zip(*columns, strict=True)]

    layers = tuple(stack.in_order(cfg, params, apart))
    others = {name: part for name, part in params.items() if name != "dense_layers"}
    return {**others, "layers": layers}


@jax.jit
def _split(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x[i] for i in range(x.shape[0]))


def _stays(path: tuple, x: jax.Array | array.QuantArray) -> bool:
    return array.is_quantised(x) or moe.stays_float32(path)


def _cast(x: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    if x.dtype == dtype:
        return x
    result = jax.block_until_ready(x.astype(dtype))
    _delete(x)
    return result


def _delete(tree: dict | jax.Array) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def prefill(
    cfg: schema.Model,
    params: dict,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    cache: kv_cache.Cache,
    *,
    attention: str | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, kv_cache.Cache]:
    """Reads right-padded prompts into the cache -> logits [B, V] after each row's last token.

    Padding must be valid token ids: causality keeps it from the prompt, and the cache's lengths
    from what follows. Raises `ValueError` where the cache is too short or the model does not reach.
    """
    B, T = tokens_BT.shape
    model.check_length(cfg, T)
    if cache.length < T or cache.num_slots != B:
        raise ValueError(
            f"a cache of {cache.num_slots} slots and {cache.length} positions cannot hold prompts "
            f"of shape {B} x {T}; give it {B} slots and at least {T} positions"
        )
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    def attend(side_k: kv_cache.Side, side_v: kv_cache.Side, layer: jax.Array | int):
        def inner(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array):
            o_BTNH = api.attention(
                q_BTNH, k_BTKH, v_BTKH, mask=api.Mask(causal=True), implementation=attention
            )
            k = kv_cache.write_prompt(side_k, layer, k_BTKH)
            return o_BTNH, (k, kv_cache.write_prompt(side_v, layer, v_BTKH))

        return inner

    x_BTD, cache = _run(cfg, params, tokens_BT, positions_BT, cache, attend, layout=layout)
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    cache = kv_cache.Cache(cache.k_LBKSH, cache.v_LBKSH, lengths_B.astype(jnp.int32))
    return _logits(cfg, params, last_B1D, layout=layout), cache


def decode_step(
    cfg: schema.Model,
    params: dict,
    tokens_B: jax.Array,
    cache: kv_cache.Cache,
    *,
    active_B: jax.Array | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, kv_cache.Cache]:
    """Appends one token to every slot -> logits [B, V] for the next one.

    Slots that are not active keep their length; their logits mean nothing.
    """
    positions_B = cache.lengths_B

    def attend(side_k: kv_cache.Side, side_v: kv_cache.Side, layer: jax.Array | int):
        def inner(q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array):
            k = kv_cache.write_token(side_k, layer, k_B1KH[:, 0], positions_B)
            v = kv_cache.write_token(side_v, layer, v_B1KH[:, 0], positions_B)
            o_BNH = cached.attention(
                q_B1NH[:, 0],
                kv_cache.read(k, layer),
                kv_cache.read(v, layer),
                lengths_B=positions_B + 1,
            )
            return o_BNH[:, None], (k, v)

        return inner

    x_B1D, cache = _run(
        cfg, params, tokens_B[:, None], positions_B[:, None], cache, attend, layout=layout
    )
    step_B = 1 if active_B is None else active_B.astype(jnp.int32)
    cache = kv_cache.Cache(cache.k_LBKSH, cache.v_LBKSH, positions_B + step_B)
    return _logits(cfg, params, x_B1D, layout=layout), cache


def _run(
    cfg: schema.Model,
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: kv_cache.Cache,
    attend: Callable,
    *,
    layout: Layout | None,
) -> tuple[jax.Array, kv_cache.Cache]:
    """The model's layers with the cache as carry -> final norm's output, cache."""
    layers = params["layers"]
    if isinstance(layers, tuple) != isinstance(cache.k_LBKSH, tuple):
        raise ValueError(
            "the cache's form must follow the parameters': make it with stacked="
            f"{not isinstance(layers, tuple)}"
        )
    one = layers[0] if isinstance(layers, tuple) else layers
    block = fused.block if fused.is_fused(one) else model.block
    turn = rope.rotation(cfg, positions_BT)

    def body(carry, layer: dict, index: jax.Array | int):
        x_BTD, (k, v) = carry
        x_BTD, sides, _ = block(cfg, layer)(
            x_BTD, turn=turn, attend=attend(k, v, index), layout=layout
        )
        return (x_BTD, sides), None

    x_BTD = model.embed(cfg, params, tokens_BT, dtype=cache.dtype, layout=layout)
    carry = x_BTD, (cache.k_LBKSH, cache.v_LBKSH)
    (x_BTD, (k, v)), _ = stack.run(cfg, params, body, carry)
    x_BTD = model.parts(cfg)["norm"].bind(params["norm"])(x_BTD)
    return x_BTD, kv_cache.Cache(k, v, cache.lengths_B)


def _logits(
    cfg: schema.Model, params: dict, x_B1D: jax.Array, *, layout: Layout | None
) -> jax.Array:
    logits_BV = model.unembed(cfg, params, x_B1D, layout=layout)[:, 0]
    return sharding.constrain(logits_BV, ("batch", "act_vocab"), layout)


@dataclass(frozen=True)
class State:
    """A batch between two dispatches. tokens_B were drawn but are not in the cache yet."""

    cache: kv_cache.Cache
    tokens_B: jax.Array  # int32
    generated_B: jax.Array  # int32: tokens drawn
    remaining_B: jax.Array  # int32: tokens still to draw; 0 where the row has ended
    seen_BV: jax.Array | None  # whether in the prompt; None for "greedy"
    counts_BV: jax.Array | None  # int32: how often in the answer; None for "greedy"


_STATE = ["cache", "tokens_B", "generated_B", "remaining_B", "seen_BV", "counts_BV"]
jax.tree_util.register_dataclass(State, _STATE, [])


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "how", "length", "dtype", "attention", "layout"),
)
def start(
    cfg: schema.Model,
    params: dict,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    max_tokens_B: jax.Array,
    settings: sampling.Settings,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    length: int,
    dtype: jnp.dtype,
    attention: str | None = None,
    layout: Layout | None = None,
) -> tuple[State, jax.Array]:
    """Makes a cache of `length` positions, prefills it and draws each row's first token, [B].

    eos_E holds the ids that end a row, whichever of them comes.
    Rows with max_tokens 0 are padding of the batch: they end at once.
    """
    B, T = tokens_BT.shape
    compilations[f"start batch={B} prompt={T} cache={length} {how}"] += 1
    cache = kv_cache.create(
        cfg,
        num_slots=B,
        length=length,
        dtype=dtype,
        stacked=not isinstance(params["layers"], tuple),
        layout=layout,
    )
    with _precision(cache):
        logits_BV, cache = prefill(
            cfg, params, tokens_BT, lengths_B, cache, attention=attention, layout=layout
        )
    seen_BV = counts_BV = None
    if how == "full":
        seen_BV = sampling.mark_seen(tokens_BT, lengths_B, vocab_size=cfg.vocab_size)
        counts_BV = jnp.zeros(seen_BV.shape, jnp.int32)
    zeros_B = jnp.zeros_like(cache.lengths_B)
    state = State(cache, zeros_B, zeros_B, max_tokens_B, seen_BV, counts_BV)
    return _draw(logits_BV, state, settings, how=how, eos_E=eos_E, layout=layout)


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "how", "num_steps", "stop", "layout"),
    donate_argnames=("state",),
)
def advance(
    cfg: schema.Model,
    params: dict,
    state: State,
    settings: sampling.Settings,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    num_steps: int,
    stop: Literal["step", "dispatch"] = "step",
    layout: Layout | None = None,
) -> tuple[State, jax.Array]:
    """Draws up to `num_steps` more tokens a row -> [B, num_steps], PAD after a row's end.

    stop: whether the device leaves once every row has ended at the next step, or runs this dispatch
    to its end. The first asks the host at each step on a GPU, which costs it a gap.
    """
    B = state.tokens_B.shape[0]
    name = f"advance batch={B} cache={state.cache.length} steps={num_steps} {how}"
    compilations[name] += 1

    def body(step: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, tokens_BC = carry
        active_B = state.remaining_B > 0
        with _precision(state.cache):
            logits_BV, cache = decode_step(
                cfg, params, state.tokens_B, state.cache, active_B=active_B, layout=layout
            )
        state = dataclasses.replace(state, cache=cache)
        state, tokens_B = _draw(logits_BV, state, settings, how=how, eos_E=eos_E, layout=layout)
        return state, tokens_BC.at[:, step].set(tokens_B)

    carry = state, jnp.full((B, num_steps), PAD, jnp.int32)
    if stop == "dispatch":
        return jax.lax.fori_loop(0, num_steps, body, carry)

    def unfinished(carry: tuple[jax.Array, tuple[State, jax.Array]]) -> jax.Array:
        step, (state, _) = carry
        return (step < num_steps) & jnp.any(state.remaining_B > 0)

    def next_step(carry: tuple[jax.Array, tuple[State, jax.Array]]):
        step, inner = carry
        return step + 1, body(step, inner)

    return jax.lax.while_loop(unfinished, next_step, (jnp.int32(0), carry))[1]


def _precision(cache: kv_cache.Cache) -> contextlib.AbstractContextManager:
    """Who asks for float32 means it: GPUs and TPUs would otherwise multiply in fewer bits."""
    if cache.dtype == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def _placed(state: State, layout: Layout | None) -> State:
    """`state` where it always lies between dispatches, so that none recompiles for the next."""

    def batch(x: jax.Array) -> jax.Array:
        return sharding.constrain(x, ("batch", None)[: x.ndim], layout)

    rest = jax.tree.map(batch, dataclasses.replace(state, cache=None))
    return dataclasses.replace(rest, cache=kv_cache.constrain(state.cache, layout))


def _draw(
    logits_BV: jax.Array,
    state: State,
    settings: sampling.Settings,
    *,
    how: sampling.How,
    eos_E: jax.Array,
    layout: Layout | None,
) -> tuple[State, jax.Array]:
    """Draws a token for every active row -> the state with it, and tokens [B], PAD elsewhere."""
    active_B = state.remaining_B > 0
    # Sorting and drawing are per row: with whole rows on each device no collective is needed.
    logits_BV = sharding.constrain(logits_BV, ("batch", None), layout)
    drawn_B = sampling.draw(
        logits_BV,
        settings,
        how=how,
        positions_B=state.cache.lengths_B,
        generated_B=state.generated_B,
        eos_E=eos_E,
        seen_BV=state.seen_BV,
        counts_BV=state.counts_BV,
    ).tokens_B
    ended_B = sampling.ends(drawn_B, settings, eos_E=eos_E)
    counts_BV = state.counts_BV
    if counts_BV is not None:
        counts_BV = counts_BV.at[jnp.arange(counts_BV.shape[0]), drawn_B].add(1)
    state = dataclasses.replace(
        state,
        tokens_B=jnp.where(active_B, drawn_B, 0),
        generated_B=state.generated_B + active_B,
        remaining_B=jnp.where(ended_B | ~active_B, 0, state.remaining_B - 1),
        counts_BV=counts_BV,
    )
    return _placed(state, layout), jnp.where(active_B, drawn_B, PAD)
