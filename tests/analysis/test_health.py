"""RouterHealth: silent on healthy runs, in time and by name on sick ones."""

import numpy as np
import pytest
from synthetic_run import SyntheticRun

from moejax.analysis.health import RouterHealth


def watch(run: SyntheticRun, **thresholds) -> list[tuple[int, str]]:
    """All warnings of a run as (step, text)."""
    health = RouterHealth(
        moe_layers=[run.first_layer + i for i in range(run.num_layers)],
        k=run.k,
        choices_per_step=run.tokens_per_step * run.k,
        **thresholds,
    )
    records = [r for r in run.records() if r["kind"] == "train"]
    return [(r["step"], text) for r in records for text in health.update(r["step"], r["values"])]


def small_run(log_every: int, **changes) -> SyntheticRun:
    return SyntheticRun(num_records=max(6, 400 // log_every), log_every=log_every, **changes)


@pytest.mark.parametrize("log_every", [1, 10, 50, 200])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_healthy_run_is_silent(log_every, seed):
    assert watch(small_run(log_every, seed=seed)) == []


def test_healthy_wide_run_is_silent():
    run = small_run(20, num_layers=12, num_experts=128, k=8)
    assert watch(run) == []


@pytest.mark.parametrize("log_every", [1, 10, 50])
@pytest.mark.parametrize("start", [0, 215])
def test_collapse_warns_within_100_steps(log_every, start):
    run = small_run(log_every, collapse_layer=2, collapse_from=start, first_layer=1)
    step, text = watch(run)[0]
    assert start < step <= max(start, 1) + 100
    assert text.startswith("layer 3: routing has collapsed")
    assert "load-balance loss" in text


@pytest.mark.parametrize("log_every", [1, 10, 50])
@pytest.mark.parametrize("start", [0, 233])
def test_dead_expert_warns_within_100_steps_and_is_named(log_every, start):
    run = small_run(log_every, dead_layer=3, dead_expert=5, dead_from=start, first_layer=1)
    warnings = watch(run)
    assert len(warnings) == 1
    step, text = warnings[0]
    assert start < step <= max(start, 1) + 100
    assert text.startswith("layer 4: expert 5 has received no token for ")


def test_first_steps_are_not_judged():
    run = small_run(1, dead_layer=0, dead_from=0)
    step, _ = watch(run)[0]
    assert step >= RouterHealth(moe_layers=[0], k=1).warmup_steps + 20


def test_few_choices_need_more_steps():
    """2 tokens choose 4 of 16 experts: in 20 steps one expert or another gets none by chance."""
    sparse = small_run(10, tokens_per_step=2)
    assert watch(sparse) == []
    assert watch(sparse, min_expected_choices=0) != []
    late = watch(small_run(10, tokens_per_step=2, dead_layer=0, dead_from=100))
    assert "expert 5" in late[0][1]


def test_nearly_dead_expert_is_not_called_silent():
    health = RouterHealth(moe_layers=[0], k=1)
    load = np.array([0.001, 0.333, 0.333, 0.333])
    texts = [t for step in range(10, 60, 10) for t in health.update(step, one_layer(load))]
    assert texts == [texts[0]]
    assert "expert 0 has received less than 1% of an even share for 20 steps" in texts[0]


def test_repeats_only_after_the_window():
    load = np.array([0.0, 0.5, 0.25, 0.25])
    health = RouterHealth(moe_layers=[0], k=1, repeat_every=300)
    steps = [s for s in range(10, 1000, 10) if health.update(s, one_layer(load))]
    assert steps == [30, 330, 630, 930]


def test_another_dead_expert_is_reported_after_the_gap():
    health = RouterHealth(moe_layers=[0], k=1)
    one, two = np.array([0.0, 0.4, 0.3, 0.3]), np.array([0.0, 0.0, 0.5, 0.5])
    texts = {}
    for step in range(10, 300, 10):
        for text in health.update(step, one_layer(one if step < 100 else two)):
            texts[step] = text
    assert list(texts) == [30, 110]
    assert "experts 0 and 1 have received no token" in texts[110]


def test_one_expert_taking_every_token_is_a_collapse():
    """The other choices are spread evenly, so only the concentration shows it."""
    load = np.append(0.5, np.full(15, 0.5 / 15))
    health = RouterHealth(moe_layers=[0], k=2)
    texts = [t for s in range(10, 60, 10) for t in health.update(s, one_layer(load))]
    assert len(texts) == 1
    assert "collapsed onto one expert: expert 0 takes 8.0 times an even share" in texts[0]


def test_overconfident_router():
    values = one_layer(np.full(4, 0.25)) | {"router/entropy": [0.01]}
    health = RouterHealth(moe_layers=[7], k=1)
    texts = [t for s in range(10, 60, 10) for t in health.update(s, values)]
    assert len(texts) == 1
    assert "layer 7: the router is certain" in texts[0]
    assert "z-loss" in texts[0]


def test_dropped_tokens_and_broken_load_are_reported_at_once():
    values = one_layer(np.full(4, 0.25)) | {"router/dropped": [12]}
    (text,) = RouterHealth(moe_layers=[0], k=1).update(1, values)
    assert "12 token choices" in text
    (text,) = RouterHealth(moe_layers=[0], k=1).update(1, one_layer([np.nan] * 4))
    assert "not a number" in text


def test_many_layers_share_one_sentence():
    load = np.tile([0.0, 0.5, 0.25, 0.25], (6, 1))
    load[4] = [0.0, 0.0, 0.5, 0.5]
    health = RouterHealth(moe_layers=range(10, 16), k=1)
    texts = [t for s in (10, 20, 30) for t in health.update(s, {"router/load": load})]
    assert len(texts) == 1
    assert "6 of 6 MoE layers (10, 11, 12, 13 and 2 more)" in texts[0]
    assert "the worst, layer 14: experts 0 and 1" in texts[0]


def test_rollback_starts_over():
    load = one_layer(np.array([0.0, 0.5, 0.25, 0.25]))
    health = RouterHealth(moe_layers=[0], k=1)
    first = [s for s in (10, 20, 30, 40) if health.update(s, load)]
    again = [s for s in (20, 30, 40, 50) if health.update(s, load)]
    assert (first, again) == ([30], [40])


def test_dense_model_has_nothing_to_watch():
    health = RouterHealth(moe_layers=[], k=1)
    assert health.update(10, {"loss": 1.0}) == []
    assert health.update(20, {"router/load": []}) == []


def test_wrong_number_of_layers_is_an_error():
    with pytest.raises(ValueError, match="2 rows but moe_layers names 1"):
        RouterHealth(moe_layers=[0], k=1).update(1, {"router/load": [[0.5, 0.5]] * 2})


def one_layer(load) -> dict:
    return {"router/load": [list(load)]}
