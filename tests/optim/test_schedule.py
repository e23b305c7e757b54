"""Schedules: the rate of every update of a run, whatever its length."""

import math

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.optim.schedule import WSD, WarmupCosine


def rates(schedule, steps, past=0):
    return np.asarray(jax.jit(jax.vmap(schedule.build(steps)))(np.arange(steps + past)))


def test_warmup_cosine_against_its_formula():
    got = rates(WarmupCosine(peak=2e-3, warmup_steps=4, final_fraction=0.1), 20, past=5)
    want = [2e-3 * (t + 1) / 5 for t in range(4)]
    for t in range(4, 25):
        progress = min((t - 4) / 16, 1.0)
        want.append(2e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[0] > 0
    assert got.argmax() == 4
    np.testing.assert_allclose(got[20:], 2e-4, rtol=1e-6)


def test_wsd_against_its_formula():
    got = rates(WSD(peak=1.0, warmup_steps=2, decay_fraction=0.25, final_fraction=0.2), 20, past=3)
    want = [1 / 3, 2 / 3] + [1.0] * 14
    want += [1.0 - 0.8 * k / 5 for k in range(1, 6)] + [0.2] * 2
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_wsd_never_wastes_the_last_update():
    got = rates(WSD(peak=1.0, warmup_steps=0), 10, past=1)
    assert got[0] == 1.0
    assert got[9] == pytest.approx(0.5)
    assert got[10] == 0.0


@pytest.mark.parametrize("kind", [WarmupCosine, WSD])
def test_the_whole_run_follows_steps(kind):
    """The run's length is nowhere in the schedule: building for other steps moves everything."""
    schedule = kind(peak=1.0, warmup_steps=2)
    short, long = rates(schedule, 10), rates(schedule, 1000)
    assert short[9] < 0.6
    assert long[9] > 0.99
    assert long[999] < 0.11


def test_no_warmup_and_warmup_for_the_whole_run():
    assert rates(WarmupCosine(peak=1.0, warmup_steps=0), 5)[0] == 1.0
    np.testing.assert_allclose(
        rates(WarmupCosine(peak=1.0, warmup_steps=5), 5), np.arange(1, 6) / 6, rtol=1e-6
    )


@pytest.mark.parametrize(
    "schedule, steps, text",
    [
        (WarmupCosine(peak=1.0, warmup_steps=100), 50, "warmup_steps=100 .* 50 steps; lower"),
        (WSD(peak=1.0, warmup_steps=100), 50, "warmup_steps=100 .* 50 steps; lower"),
        (WSD(peak=1.0, warmup_steps=45), 50, r"decay_fraction=0.2 \(10 steps\) do not fit into 50"),
        (WSD(peak=1.0, warmup_steps=0, decay_fraction=-1.0), 50, "do not fit"),
        (WSD(peak=1.0, warmup_steps=0, decay_fraction=1.5), 50, "do not fit"),
        (WarmupCosine(peak=float("nan"), warmup_steps=0), 50, "peak=nan"),
        (WarmupCosine(peak=1.0, warmup_steps=-1), 50, "warmup_steps=-1"),
        (WarmupCosine(peak=1.0, warmup_steps=0, final_fraction=2.0), 50, "final_fraction=2.0"),
        (WarmupCosine(peak=1.0, warmup_steps=0), 0, "steps=0"),
    ],
)
def test_errors(schedule, steps, text):
    with pytest.raises(UserError, match=text):
        schedule.build(steps)
