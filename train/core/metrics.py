"""Metrics of a run: metrics.jsonl, TensorBoard, a progress bar or plain lines, and speed.

metrics.jsonl has one line for every step (`kind` train) and one for every evaluation (`kind`
eval). A run that resumes from step n first removes the lines after step n, so that every step
appears once.
"""

import collections
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import rich.progress
from rich.console import Console

from configs.models.architecture import ModelConfig
from configs.train import TrainConfig
from partitioning.processes import cluster
from qwen_jax import storage
from qwen_jax.analysis import flops
from train.core import tensorboard

Values = Mapping[str, float]
FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"


@dataclass(frozen=True)
class History:
    """Content of metrics.jsonl up to the step from which a run resumes."""

    losses: tuple[float, ...]  # the last ones, in order
    train: dict[str, float]  # the last line of each kind
    evaluation: dict[str, float]


def rewind(output: Path, step: int, *, keep: int) -> History:
    """History up to `step`, with the last `keep` losses; cuts metrics.jsonl after `step`.

    Also cuts a last line that a crash left unfinished. Lines are in order of their steps. The first
    process reads and cuts, and tells the others, which all call this.
    """
    found = _rewind(output / FILE, step, keep) if jax.process_index() == 0 else None
    first = cluster.gather(found and dataclasses.asdict(found))[0]
    return History(**{**first, "losses": tuple(first["losses"])})


def _rewind(path: Path, step: int, keep: int) -> History:
    losses: collections.deque[float] = collections.deque(maxlen=keep)
    last: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
    if not path.exists():
        return History((), {}, {})
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            values = json.loads(line) if line.endswith(b"\n") else {}
            if values.get("step", step + 1) > step:
                break
            end += len(line)
            kind = values.pop("kind")
            last[kind] = values
            if kind == "train":
                losses.append(values["loss"])
    if storage.is_remote(path):
        path.write_bytes(path.read_bytes()[:end])
    else:
        with path.open("r+b") as file:
            file.truncate(end)
    return History(tuple(losses), last["train"], last["eval"])


class Meter:
    """Speed over the steps since the last reading, pauses and compilation left out."""

    def __init__(self, cfg: ModelConfig, config: TrainConfig) -> None:
        length = config.data.sequence_length
        self._tokens = config.batch_size * length  # padding included: it is computed, too
        self._flops = {
            name: flops.train_per_token(cfg, length=length, attention=name)
            for name in ("causal", "full")
        }
        self._peak = flops.peak(jax.devices()[0].device_kind)
        self._since: float | None = None
        self._steps = 0

    def step(self) -> None:
        """Count a finished step. The first one only starts the clock: it includes compilation."""
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context whose duration does not count as training time."""
        begin = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Tokens per second over all devices; TFLOP/s and MFU per device; resets the meter.

        Empty if no step was timed; without MFU if the peak of the device is not known.
        """
        if self._steps == 0 or self._since is None:
            return {}
        now = time.perf_counter()
        rate = self._steps * self._tokens / (now - self._since)
        self._since, self._steps = now, 0
        values = {"tokens_per_second": rate}
        for name, per_token in self._flops.items():
            achieved = rate * per_token / jax.device_count()
            values[f"tflops_{name}"] = achieved / 1e12
            if self._peak is not None:
                values[f"mfu_{name}"] = achieved / self._peak
        return values


class Log:
    """Log that writes and shows metrics; in processes other than the first it does nothing.

    In a bucket, where nothing can be appended to, files appear with each checkpoint (`publish`).
    """

    def __init__(self, output: Path, *, step: int, num_steps: int) -> None:
        self._enabled = jax.process_index() == 0
        self._num_steps = num_steps
        self._begin, self._first = time.perf_counter(), step
        self._progress: rich.progress.Progress | None = None
        if not self._enabled:
            return
        self._output, self._here = output, output
        if storage.is_remote(output):
            self._staged = tempfile.TemporaryDirectory()
            self._here = Path(self._staged.name)
            if (output / FILE).exists():
                (self._here / FILE).write_bytes((output / FILE).read_bytes())
        self._file = (self._here / FILE).open("a", encoding="utf-8")
        self._board = tensorboard.Board(self._here / TENSORBOARD, first=step + 1)
        console = Console()
        if console.is_terminal:
            self._progress = _progress_bar(console)
            self._task = self._progress.add_task("", total=num_steps, completed=step, text="")
            self._progress.start()

    def train(self, step: int, values: Values, *, show: bool) -> None:
        """Write a step's metrics to metrics.jsonl, and with `show` to TensorBoard and screen."""
        if not self._enabled:
            return
        self._write("train", step, values)
        if show:
            self._scalars("train", step, values)
        if self._progress is not None:
            text = {"text": _describe_briefly(values)} if show else {}
            self._progress.update(self._task, completed=step, **text)
        elif show:
            self.say(f"step {step}/{self._num_steps}  {_describe(values)}  eta {self._eta(step)}")

    def evaluation(self, step: int, values: Values) -> None:
        """Write the metrics of a held-out evaluation after `step` updates."""
        if not self._enabled:
            return
        self._write("eval", step, values)
        self._scalars("eval", step, values)
        self.say(
            f"step {step}  held-out loss {values['cross_entropy']:.4f}  "
            f"accuracy {values['accuracy']:.2%}"
        )

    def publish(self) -> None:
        """Copy the local files to the run's output, if that is a bucket."""
        if self._enabled and self._here != self._output:
            storage.copy_tree(self._here, self._output)

    def say(self, text: str) -> None:
        """Show one line of text on the screen."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        elif self._enabled:
            print(text, flush=True)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._enabled:
            return
        if self._progress is not None:
            self._progress.stop()
        # After an earlier error, such as a full disk, that error is the one to report.
        with contextlib.suppress(OSError) if exception[0] else contextlib.nullcontext():
            self._board.close()
            self._file.close()
            self.publish()
        if self._here != self._output:
            self._staged.cleanup()

    def _write(self, kind: str, step: int, values: Values) -> None:
        # One write a line, handed to the system at once: a killed run loses no finished step.
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def _scalars(self, prefix: str, step: int, values: Values) -> None:
        for name, value in values.items():
            self._board.scalar(f"{prefix}/{name}", value, step)
        self._board.flush()

    def _eta(self, step: int) -> str:
        rate = (time.perf_counter() - self._begin) / max(step - self._first, 1)
        seconds = round(rate * (self._num_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _progress_bar(console: Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.completed}/{task.total}"),
        rich.progress.BarColumn(bar_width=10),
        rich.progress.TextColumn("{task.fields[text]}"),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def _describe_briefly(values: Values) -> str:
    """Metrics as text that fits beside a progress bar on a terminal of 80 columns."""
    parts = [f"loss {values['loss']:.3f}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
        known = "mfu_causal" in values
        parts.append(
            f"MFU {values['mfu_causal']:.1%}" if known else f"{values['tflops_causal']:.3g} TFLOP/s"
        )
    return "  ".join(parts)


def _describe(values: Values) -> str:
    parts = [f"loss {values['loss']:.4f}", f"lr {values['learning_rate']:.2e}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{values['tflops_causal']:.3g} TFLOP/s")
    if "mfu_causal" in values:
        parts.append(f"MFU {values['mfu_causal']:.1%} ({values['mfu_full']:.1%} full attention)")
    return "  ".join(parts)
