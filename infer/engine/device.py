"""The device's side of an engine: its arrays, its compiled programs, and what they are run on."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.engine import EngineConfig
from configs.models.architecture import ModelConfig
from infer.engine import buckets, program_table, scheduler
from infer.engine.program_table import Padding, Program
from infer.speculation.draft import Draft
from infer.speculation.proposers import DraftChunk
from partitioning import sharding
from partitioning.sharding import Layout
from qwen_jax.decode import forward, sampling, slot_state, weights
from qwen_jax.decode.weights import DecodeWeights
from qwen_jax.model import transformer
from qwen_jax.ops.attention.paged import kv_pages
from qwen_jax.quant import array


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_alike(old: Any, new: Any, *, name: str, attributes: Sequence[str]) -> None:
    """Raises `ValueError`, naming the leaf, where names or attributes of leaves differ."""
    ours, theirs = _named_leaves(old), _named_leaves(new)
    for leaf in sorted(set(ours) ^ set(theirs)):
        here, there = ("missing", "given") if leaf in theirs else ("given", "missing")
        raise ValueError(
            f"{name}: {leaf} is {there} in the new weights and {here} in the engine's; give "
            f"weights of the same names, shapes and dtypes, in the same form"
        )
    for leaf, ours_of_leaf in ours.items():
        for attribute in attributes:
            mine, its = getattr(ours_of_leaf, attribute), getattr(theirs[leaf], attribute)
            if mine != its:
                raise ValueError(
                    f"{name}: {leaf} has {attribute} {its} in the new weights and {mine} in the "
                    f"engine's; give weights of the same shapes and dtypes, or make a new engine"
                )


class Device:
    """Arrays of one engine, and its programs, each compiled once."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: DecodeWeights,
        *,
        settings: EngineConfig,
        eos_ids: Sequence[int],
        dtype: jnp.dtype,
        attention: forward.Attention | None,
        layout: Layout | None,
        draft: Draft | None,
    ):
        """`settings` have their num_pages and max_length."""
        self._cfg, self._layout, self._dtype = cfg, layout, dtype
        self._has_draft = draft is not None
        self._pad = Padding(cfg, settings)
        sizes = {
            "num_pages": settings.num_pages,
            "page_size": settings.page_size,
            "dtype": dtype,
            "storage": settings.kv_cache,
        }
        state = slot_state.empty(
            cfg, num_slots=settings.num_slots, width=self._pad.width, layout=layout, **sizes
        )
        self._arrays: dict[str, Any] = {
            "params": params,
            "state": state,
            "eos_E": np.asarray(tuple(eos_ids), np.int32),
        }
        if draft is not None:
            self._arrays["draft_params"] = draft.params
            self._arrays["draft_pages"] = kv_pages.create(draft.cfg, layout=draft.layout, **sizes)
        self._shardings = {
            name: jax.tree.map(lambda x: x.sharding, self._arrays[name])
            for name in ("state", "draft_pages")
            if name in self._arrays
        }
        self._where = None if layout is None else jax.NamedSharding(layout.mesh, jax.P())
        self._allow_all: dict[int, jax.Array] = {}  # masks that allow all tokens, by rows
        self.programs: dict[str, Program] = program_table.table(
            cfg, settings, dtype=dtype, attention=attention, layout=layout, draft=draft
        )
        self._compiled: dict[str, jax.stages.Compiled] = {}
        self._lock = threading.Lock()

    @property
    def num_compiled(self) -> int:
        """Programs of this engine compiled so far."""
        return len(self._compiled)

    def warm_up(self, *, show: Callable[[str], None]) -> None:
        """Compiles the programs of the table that requests can need, and runs each on padding.

        As many are compiled at a time as there are cores, 16 at most; `show` is told of each.
        """

        def compile(name: str) -> tuple[str, float]:
            began = time.monotonic()
            self.compile(name)
            return name, time.monotonic() - began

        names = [name for name, row in self.programs.items() if row.compile_at == "warm_up"]
        missing = [name for name in names if name not in self._compiled]
        pool = futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            jobs = [pool.submit(compile, name) for name in missing]
            for count, job in enumerate(futures.as_completed(jobs), 1):
                name, seconds = job.result()
                show(f"compiled {count} of {len(jobs)}: {name}, {seconds:.1f} s")
        finally:
            pool.shutdown(cancel_futures=True)
        for name in names:
            jax.block_until_ready(self.run(name, **self.programs[name].padding))

    def compile(self, name: str) -> None:
        """Compiles a program of the table; in any thread, while none is dispatched."""
        compiled = self.programs[name].lower(self._own()).compile()
        with self._lock:
            assert name not in self._compiled, f"{name} compiled twice"
            self._compiled[name] = compiled

    def run(self, name: str, /, **arguments) -> tuple:
        """Dispatches a program of the table -> its outputs, but for the array that it replaces."""
        program = self.programs[name]
        if name not in self._compiled:
            self.compile(name)
        own = self._own()
        kept = {argument: own[name] for argument, name in program.arrays.items()}
        outputs = self._compiled[name](**kept, **arguments)
        if type(outputs) is not tuple:
            outputs = (outputs,)
        if program.replaces is None:
            return outputs
        self._arrays[program.replaces] = self._as_compiled_for(program.replaces, outputs[0])
        return outputs[1:]

    def _as_compiled_for(self, name: str, new: Any) -> Any:
        """`new` in the shardings that programs are compiled for; XLA may choose others."""
        if self._layout is None:
            return new
        return jax.tree.map(
            lambda x, where: (
                x if x.sharding.is_equivalent_to(where, x.ndim) else jax.device_put(x, where)
            ),
            new,
            self._shardings[name],
        )

    def placed(self, name: str, new: Any) -> Any:
        """`new` where the device's array of this name is, in its shardings: to `replace` it.

        Raises `ValueError`, naming the leaf, where names, shapes or dtypes are not the same.
        """
        old = self._arrays[name]
        _check_alike(old, new, name=name, attributes=("shape", "dtype"))
        if jax.tree.structure(old) != jax.tree.structure(new):
            raise ValueError(f"{name}: the new weights are in another form; prepare them alike")
        return jax.device_put(new, jax.tree.map(lambda array: array.sharding, old))

    def prepared(self, params: dict) -> DecodeWeights:
        """The model's stacked parameters in the form of the engine's; `params` stay as they are.

        Raises `ValueError`, naming the leaf, where names or shapes are not the model's.
        """
        quantised = any(
            map(array.is_quantised, jax.tree.leaves(params, is_leaf=array.is_quantised))
        )
        if not quantised:
            expected = transformer.shapes(self._cfg)
            _check_alike(expected, params, name="params", attributes=("shape",))
        if self._layout is None:
            where = jax.tree.leaves(self._arrays["params"])[0].sharding
        else:
            where = sharding.shardings(transformer.axes(self._cfg), self._layout)
            where = array.shardings(where, params)
        return weights.prepare(
            self._cfg,
            jax.device_put(params, where),
            dtype=self._dtype,
            form=self._arrays["params"].form,
            layout=self._layout,
            source="kept",
        )

    def replace(self, name: str, new: Any) -> None:
        """Has later dispatches read `new`, which `placed` gave; those under way read the old."""
        self._arrays[name] = new

    def _own(self) -> dict[str, Any]:
        return {**self._arrays, "slots": self._arrays["state"].slots}

    # -- dispatches

    def prefill(
        self, work: scheduler.Prefill, masks: Sequence[np.ndarray | None], *, score: str
    ) -> tuple:
        """Prefills chunks on both models -> tokens drawn, and logprobs of the prompts or None."""
        shape, prefix = (work.num_rows, work.length), "none" if work.fresh else "pages"
        chunks = self._pad.chunks(work, masks)
        drawn, scored = self.run(
            program_table.prefill_name(*shape, prefix=prefix, score=score), chunks=chunks
        )
        if self._has_draft:
            names = ("tokens_RT", "starts_R", "lengths_R", "table_RM")
            reads = {name: getattr(chunks, name) for name in names}
            self.run(program_table.read_draft_name(*shape, prefix=prefix), **reads)
        return drawn, scored

    def decode(
        self,
        slots: Sequence[int],
        masks: Sequence[np.ndarray | None],
        *,
        num_rows: int,
        sampler: str,
        num_steps: int,
    ) -> sampling.Drawn:
        """Draws up to `num_steps` tokens for these slots -> leaves [steps, R]."""
        name = program_table.decode_name(num_rows, sampler=sampler, num_steps=num_steps)
        slots_R = self._pad.slots(slots, num_rows=num_rows)
        (drawn,) = self.run(name, slots_R=slots_R, mask_RW=self._masks(masks, num_rows=num_rows))
        return drawn

    def verify(
        self, slots: Sequence[int], draft_RT: np.ndarray | jax.Array, *, sampler: str
    ) -> sampling.Drawn:
        """Draws a token more than the draft tokens that come true -> leaves [T + 1, R]."""
        num_rows = draft_RT.shape[0]
        (drawn,) = self.run(
            program_table.verify_name(num_rows, sampler=sampler),
            slots_R=self._pad.slots(slots, num_rows=num_rows),
            mask_RW=self._masks((), num_rows=num_rows),
            draft_RT=draft_RT,
        )
        return drawn

    def propose(self, slots: Sequence[int], *, num_rows: int, sampler: str) -> jax.Array:
        """The draft model's tokens for these slots, [R, T], on the device."""
        slots_R = self._pad.slots(slots, num_rows=num_rows)
        (draft_RT,) = self.run(
            program_table.propose_name(num_rows, sampler=sampler), slots_R=slots_R
        )
        return draft_RT

    def read_draft(self, chunks: Sequence[DraftChunk], *, num_rows: int, length: int) -> None:
        """Has the draft model alone read chunks, whose pages hold what comes before them."""
        reads = self._pad.reads(chunks, num_rows=num_rows, length=length)
        self.run(program_table.read_draft_name(num_rows, length, prefix="pages"), **reads)

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """Final hidden state of the last token, scaled to length 1: [D] in float32."""
        lengths = program_table.embed_lengths(self._cfg)
        length = buckets.round_up(len(tokens), lengths)
        tokens_1T = np.zeros((1, length), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        (hidden_1D,) = self.run(
            program_table.embed_name(length),
            tokens_RT=tokens_1T,
            lengths_R=np.asarray([len(tokens)], np.int32),
        )
        return np.asarray(hidden_1D[0])

    def _masks(
        self, masks: Sequence[np.ndarray | None], *, num_rows: int
    ) -> np.ndarray | jax.Array:
        if any(mask is not None for mask in masks):
            return self._pad.masks(masks, num_rows=num_rows)
        if num_rows not in self._allow_all:  # kept on the device: it is large, and asked for often
            mask_RW = self._pad.masks((), num_rows=num_rows)
            self._allow_all[num_rows] = jax.device_put(mask_RW, self._where)
        return self._allow_all[num_rows]
