"""The training loop of every recipe: steps, evaluation, checkpoints, and how a run ends.

A recipe brings a program (`train/core/step.py`), batches, and a way to make the first state. The
loop keeps the device busy: the metrics of step n are read when step n + 1 has been dispatched.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning.processes import cluster
from qwen_jax import storage
from train.core import batches, interrupt, metrics, profile
from train.core import guard as guard_lib
from train.core import state as state_lib
from train.core.step import Program, State, Sums

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run it again


@dataclass(frozen=True)
class Inputs:
    """Data and initial state that a recipe gives to the loop.

    source: this process's training batches; the loop closes it.
    start: makes the state of a new run.
    held_out: one pass of held-out batches, or `None` to go without.
    merge_states: the data states of all processes as one.
    """

    source: batches.Source
    start: Callable[[], State]
    held_out: Callable[[], Iterable[batches.HostBatch]] | None = None
    merge_states: Callable[[list[dict]], dict] = lambda states: states[0]


@dataclass(frozen=True)
class Result:
    """How a run ended: `finished` all its steps, or was `interrupted` by a signal.

    train, evaluation: the last lines of metrics.jsonl of each kind.
    """

    status: Literal["finished", "interrupted"]
    step: int
    train: dict[str, float]
    evaluation: dict[str, float]

    @property
    def exit_code(self) -> int:
        """0, or EXIT_INTERRUPTED."""
        return 0 if self.status == "finished" else EXIT_INTERRUPTED


def run(cfg: ModelConfig, config: TrainConfig, program: Program, inputs: Inputs) -> Result:
    """Train from the newest checkpoint in `config.output`, or from the start, to `num_steps`.

    SIGTERM or SIGINT saves at the next step's end and returns. Raises `guard.Diverged` where the
    loss is no longer finite or has left its level (nothing is saved then), `state.DiskFull` where
    the disk is full, and `ValueError` for a checkpoint of another model.
    """
    output = storage.folder(config.output)
    with contextlib.ExitStack() as stack:
        stack.enter_context(state_lib.explain_full_disk(output))
        stack.callback(inputs.source.close)
        asked = stack.enter_context(interrupt.catch())
        store = stack.enter_context(state_lib.Store(output, config.checkpoint, cfg, program.state))
        cluster.stage("reading the last checkpoint")
        restored = store.restore()
        step = 0 if restored is None else restored.step
        history = metrics.rewind(output, -1 if restored is None else step, keep=guard_lib.WINDOW)
        log = stack.enter_context(metrics.Log(output, step=step, num_steps=config.num_steps))
        cluster.stage("the first state")
        if restored is None:
            state = inputs.start()
        else:
            log.say(f"going on from the checkpoint of step {step} in {store.folder}")
            inputs.source.set_state(restored.data)
            state = restored.state
        del restored  # the step donates the state: no second reference may be left
        loop = _Loop(cfg, config, program, inputs, store=store, log=log, history=history)
        try:
            return loop.train(state, step, asked)
        except guard_lib.Diverged as error:
            raise guard_lib.Diverged(f"{error}. {_remedy(store)}") from None


class _Loop:
    """The loop of one run, with the values that its steps share."""

    def __init__(
        self,
        cfg: ModelConfig,
        config: TrainConfig,
        program: Program,
        inputs: Inputs,
        *,
        store: state_lib.Store,
        log: metrics.Log,
        history: metrics.History,
    ) -> None:
        self._config, self._program, self._inputs = config, program, inputs
        self._store, self._log = store, log
        self._guard = guard_lib.Guard(config, recent=history.losses)
        self._meter = metrics.Meter(cfg, config)
        self._last = {"train": history.train, "eval": history.evaluation}
        self._unread: tuple[int, dict[str, jax.Array]] | None = None
        shape = (config.batch_size, config.data.sequence_length)
        self._part = batches.share(program.batch_sharding, shape)

    def train(self, state: State, first: int, asked: Callable[[int], bool]) -> Result:
        """Steps until `num_steps`, or until `asked`; then a last checkpoint."""
        config, step, data = self._config, first, {}
        if step == 0:
            self._evaluate(state, step)
        rows = batches.prefetch(self._inputs.source, self._put)
        overdue = False  # a checkpoint is due, but the loss is at a spike
        traces = storage.folder(config.output) / metrics.TENSORBOARD
        with profile.window(config.profile_steps, traces) as mark:
            while step < config.num_steps and not asked(step):
                cluster.stage(f"step {step + 1}")
                batch, data = _next(rows, step)
                mark(step + 1, state.step)
                rate = self._program.learning_rate(step)
                # An accidental transfer from the host would stall every step, so it is an error.
                with jax.transfer_guard("disallow"):
                    state, values = self._program.step(state, batch, rate)
                step += 1
                if self._shows(step):
                    values["param_norm"] = self._program.param_norm(state.params)
                self._read()
                self._unread = (step, values)
                overdue |= step % config.checkpoint.every_steps == 0
                if overdue or step % config.eval_every_steps == 0 or step == config.num_steps:
                    self._read()
                    if step % config.eval_every_steps == 0 or step == config.num_steps:
                        self._evaluate(state, step)
                    if overdue and self._guard.calm:
                        self._save(step, state, data)
                        overdue = False
            self._read()
        return self._finish(state, step, data, trained=step > first)

    def _finish(self, state: State, step: int, data: dict, *, trained: bool) -> Result:
        status = "finished" if step >= self._config.num_steps else "interrupted"
        if trained and self._guard.calm:
            self._save(step, state, data)
        elif trained and status == "finished":
            self._guard.refuse_end(step)
        elif trained:
            self._log.say(f"step {step} is not saved: its loss is far above the level it had")
        self._store.wait()
        self._log.publish()
        self._log.say(f"{status} at step {step}; checkpoints in {self._store.folder}")
        return Result(status, step, self._last["train"], self._last["eval"])

    def _shows(self, step: int) -> bool:
        return step % self._config.log_every_steps == 0 or step == self._config.num_steps

    def _put(self, batch: batches.HostBatch) -> dict[str, jax.Array]:
        return batches.place(batch, self._program.batch_sharding, part=self._part)

    def _read(self) -> None:
        """Fetch the metrics of the last step that was not read: guard, log, show."""
        self._store.check()
        if self._unread is None:
            return
        step, values = self._unread
        self._unread = None
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        self._guard.observe(step, values)
        del values["finite"]  # always 1 here: the guard stops the run otherwise
        self._meter.step()
        if self._shows(step):
            values |= self._meter.read()
        self._log.train(step, values, show=self._shows(step))
        self._last["train"] = {"step": step, **values}

    def _evaluate(self, state: State, step: int) -> None:
        if self._inputs.held_out is None:
            return
        cluster.stage(f"the evaluation after step {step}")
        with self._meter.pause():
            values = evaluate(self._program, state.params, self._inputs.held_out(), put=self._put)
        self._log.evaluation(step, values)
        self._last["eval"] = {"step": step, **values}

    def _save(self, step: int, state: State, data: dict) -> None:
        cluster.stage(f"saving step {step}")
        self._log.publish()
        with self._meter.pause():
            states = batches.gather_states(data, self._part)
            self._store.save(step, state, self._inputs.merge_states(states))


def _next(rows: Iterator[tuple[dict[str, jax.Array], dict]], step: int):
    try:
        return next(rows)
    except StopIteration:
        raise ValueError(
            f"the training data ended after {step} steps; set num_steps={step}, or add data"
        ) from None


def _remedy(store: state_lib.Store) -> str:
    good = store.latest()
    if good is None:
        return "No checkpoint exists yet; start again with a lower optimizer.peak_learning_rate"
    folder = store.folder / str(good)
    return (
        f"The last good checkpoint is {folder}. The same run would meet the same batches: start "
        f"one in another output with init_from={folder} and a lower "
        f"optimizer.peak_learning_rate or another data.seed"
    )


def evaluate(
    program: Program,
    params: dict,
    held_out: Iterable[batches.HostBatch],
    *,
    put: Callable[[batches.HostBatch], dict[str, jax.Array]],
) -> dict[str, float]:
    """Mean loss and metrics per token over the batches of `held_out`, and the number of tokens.

    The mean is over tokens by weight, not over batches, so padding in the last batch has no effect.
    Raises `ValueError` if no token carries weight.
    """
    total: Sums | None = None
    for batch in held_out:
        sums = program.evaluate(params, put(batch))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    total = jax.device_get(total)
    if total is None or total.weight == 0:
        raise ValueError(
            "the held-out data has no token to evaluate; raise data.eval_fraction, or give "
            "data.eval_paths"
        )
    weight = float(total.weight)
    means = {name: float(value) / weight for name, value in total.metrics.items()}
    return {"loss": float(total.loss) / weight, **means, "tokens": weight}
