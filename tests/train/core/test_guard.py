"""The guard stops what diverges, and leaves alone what does not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.train import TrainConfig
from train.core import guard


def values(loss: float, **changes) -> dict[str, float]:
    return {"loss": loss, "grad_norm": 1.0, "finite": 1.0, "tokens": 8.0, **changes}


def make(**changes) -> guard.Guard:
    return guard.Guard(TrainConfig(spike_factor=2.0, spike_patience=3, **changes))


@pytest.mark.parametrize(
    "bad", [values(float("nan")), values(float("inf")), values(3.0, finite=0.0)]
)
def test_not_finite_stops_at_once(bad):
    with pytest.raises(guard.Diverged, match="step 7: .* not finite"):
        make().observe(7, bad)


def test_a_batch_without_tokens_stops():
    with pytest.raises(guard.Diverged, match="step 2: no token"):
        make().observe(2, values(0.0, tokens=0.0))


def test_spikes_stop_only_when_they_last():
    watch = make()
    for step in range(20):
        watch.observe(step, values(3.0))
    for _ in range(3):  # two in a row are borne, any number of times
        watch.observe(20, values(9.0))
        watch.observe(21, values(9.0))
        assert not watch.calm
        watch.observe(22, values(3.0))
        assert watch.calm
    watch.observe(23, values(6.5))
    watch.observe(24, values(6.5))
    with pytest.raises(guard.Diverged, match=r"step 25: loss 6.5 .* mean 3, .*patience=3"):
        watch.observe(25, values(6.5))


def test_history_arms_the_guard_where_a_run_goes_on():
    watch = guard.Guard(TrainConfig(spike_factor=2.0, spike_patience=1), recent=[3.0] * 20)
    with pytest.raises(guard.Diverged):
        watch.observe(21, values(9.0))


@settings(deadline=None)
@given(st.lists(st.floats(2.0, 4.0), max_size=300))
def test_a_loss_within_the_factor_never_stops(losses):
    watch = make()
    for step, loss in enumerate(losses):
        watch.observe(step, values(loss))
        assert watch.calm
