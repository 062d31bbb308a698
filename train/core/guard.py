"""Guard that stops a run whose loss is not finite, or stays far above its running mean."""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping

from configs.train import TrainConfig

WINDOW = 100  # steps in the running mean
_ENOUGH = 10  # steps before the mean is meaningful


class Diverged(RuntimeError):
    """Training diverged; no checkpoint was saved since."""

    exit_code = 3


class Guard:
    """Guard over the loss of every step; `recent` are the losses before a resumed run's first."""

    def __init__(self, config: TrainConfig, *, recent: Iterable[float] = ()) -> None:
        self._factor = config.spike_factor
        self._patience = config.spike_patience
        self._losses = collections.deque(recent, maxlen=WINDOW)
        self._streak = 0

    @property
    def calm(self) -> bool:
        """Whether the last loss was not a spike; a state is saved only then."""
        return self._streak == 0

    def observe(self, step: int, values: Mapping[str, float]) -> None:
        """Raises `Diverged` if the run should stop here."""
        if values["tokens"] == 0:
            raise Diverged(f"step {step}: no token of the batch carries loss; look at the data")
        if not values["finite"] or not math.isfinite(values["loss"]):
            raise Diverged(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not "
                f"finite, so this update was not applied"
            )
        loss = values["loss"]
        if len(self._losses) >= _ENOUGH:
            mean = statistics.fmean(self._losses)
            if loss > self._factor * mean:
                self._spike(step, loss, mean)
                return
        self._streak = 0
        self._losses.append(loss)

    def refuse_end(self, step: int) -> None:
        """Raises `Diverged` for a run that would end while its loss is not calm."""
        raise Diverged(
            f"step {step}: the run ends with its loss more than spike_factor={self._factor:g} "
            f"times the running mean {statistics.fmean(self._losses):.4g}; to keep this state "
            f"nevertheless, run again with a larger spike_factor"
        )

    def _spike(self, step: int, loss: float, mean: float) -> None:
        self._streak += 1
        if self._streak >= self._patience:
            raise Diverged(
                f"step {step}: loss {loss:.4g} is more than spike_factor={self._factor:g} times "
                f"its running mean {mean:.4g}, for spike_patience={self._patience} steps now"
            )
