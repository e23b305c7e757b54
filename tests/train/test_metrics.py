"""Router values of a record: those of analysis.routing, and none for a layer without tokens."""

import numpy as np
import pytest

from moejax.analysis import routing
from moejax.analysis.health import RouterHealth
from moejax.models.flops import Size
from moejax.routers.topk import TopK
from moejax.train.metrics import Accumulator, router_values
from tests.models.tiny_model import dense, moe, tiny

LOADS = np.array([[6, 2, 0, 0], [0, 0, 0, 0]], np.int32)  # the second layer saw no token


@pytest.fixture
def values():
    model = tiny()
    ((segment, _), *_) = model.moe_layers.values()
    stats = {
        "load": LOADS,
        "tokens": np.array([4, 0], np.int32),
        "entropy": np.array([4 * 0.5 * np.log(4), 0.0], np.float32),
        "dropped": np.array([3, 0], np.int32),
    }
    return router_values(model, {segment: stats})


def test_values_are_those_of_the_analysis(values):
    assert values["router/load"][0] == [0.75, 0.25, 0.0, 0.0]
    assert values["router/entropy"][0] == pytest.approx(0.5)
    assert values["router/max_vio"][0] == pytest.approx(4 * 0.75 - 1) == routing.max_vio(LOADS)[0]
    assert values["router/dead"][0] == 2
    assert values["router/dropped"] == [3, 0]
    low, high = routing.load_percentiles(LOADS[0], (10, 90))
    assert (values["router/load_p10"][0], values["router/load_p90"][0]) == (low, high)


def test_a_layer_without_tokens_has_no_dead_experts_and_no_statistics(values):
    for name in ("dead", "entropy", "max_vio", "load_p10", "load_p90"):
        assert np.isnan(values[f"router/{name}"][1]), name
    assert values["router/load"][1] == [0.0] * 4


def test_a_layer_that_never_sees_a_token_is_no_trouble(values):
    only = {name: [value[1]] for name, value in values.items()}
    health = RouterHealth(moe_layers=[5], k=2, warmup_steps=0)
    assert [text for step in range(1, 100) for text in health.update(step, only)] == []


def test_with_a_single_expert_there_is_nothing_to_be_certain_of():
    model = tiny(ffn=moe(num_experts=1, router=TopK(k=1)))
    ((segment, _), *_) = model.moe_layers.values()
    two = np.ones(2, np.int32)
    stats = {"load": two[:, None], "tokens": two, "entropy": 0.0 * two, "dropped": 0 * two}
    assert router_values(model, {segment: stats})["router/entropy"] == [1.0, 1.0]


def test_a_dense_model_has_none():
    assert router_values(dense(), {}) == {}


def test_the_loss_is_what_the_steps_minimised():
    """A term that nothing counted for adds nothing to a step's loss, and is itself unknown."""
    size = Size(params=1, active_params=1, train_flops_per_token=1.0, forward_flops_per_token=1.0)
    weights = {"lm": 1.0, "manifold": 2.0}
    sums = Accumulator(dense(), size, weights=weights, tokens_per_step=1, peak_flops=None)
    step = {"measures": {}, "stats": {}, "grad_norm": 1.0, "update_norm": 1.0, "skipped": 0}
    for lm, manifold in (((6.0, 2), (0.0, 0)), ((2.0, 2), (0.0, 0))):
        sums.add(step | {"terms": {"lm": lm, "manifold": manifold}})
    values = sums.take()
    assert values["loss"] == values["loss/lm"] == 2.0
    assert np.isnan(values["loss/manifold"])
    sums.add(step | {"terms": {"lm": (6.0, 2), "manifold": (5.0, 1)}})
    assert sums.take()["loss"] == 13.0
    sums.add(step | {"terms": {"lm": (0.0, 0), "manifold": (0.0, 0)}})
    assert np.isnan(sums.take()["loss"])
