"""`tools/bench_planners.py`: its own planners are right, and the command measures and reports."""

import functools
import importlib
import json
import math
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.parallel import planners
from moejax.parallel.rebalance import rebalance
from moejax.transport.least_loaded import LeastLoaded
from tests.parallel.random_loads import random_loads

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tools():
    """The modules of the benchmark, which find each other only from their folder."""
    sys.path.insert(0, str(TOOLS))
    names = {n: f"planner_bench.{n}" for n in ("workloads", "rivals", "measure")}
    names |= {"command": "bench_planners"}
    try:
        yield types.SimpleNamespace(**{n: importlib.import_module(m) for n, m in names.items()})
    finally:
        sys.path.remove(str(TOOLS))


def test_wrapping_around_loses_nothing_and_fills_no_device_above_the_capacity(tools):
    for loads in random_loads(70, 24, 4, most=3000, seed=1):
        capacity = -(-int(loads.sum()) // 4)
        plan = np.asarray(tools.rivals.wrap_around(jnp.asarray(loads), 4, capacity))
        np.testing.assert_array_equal(plan.sum(1), loads)
        assert plan.min() >= 0
        assert plan.sum(0).max() <= capacity


def test_wrapping_around_gives_the_largest_experts_first(tools):
    plan = tools.rivals.wrap_around(jnp.int32([3, 8, 1, 0, 0, 0]), 2, 6)
    np.testing.assert_array_equal(plan[:, 1], [0, 6, 0, 0, 0, 0])


def test_replicas_by_hand(tools):
    # 3 spare slots of 3 devices: 90 -> 45 -> 30 rows, then 40 -> 20. Placed 30 30 30 20 20 20 ...
    replicas = tools.rivals.replicated(np.array([90, 40, 20, 6, 4, 1]), 3, 1)
    np.testing.assert_array_equal(replicas.sum(1), [3, 2, 1, 1, 1, 1])
    np.testing.assert_array_equal(replicas.sum(0), [3, 3, 3])
    np.testing.assert_array_equal(replicas[0], [1, 1, 1])
    full = tools.rivals.replicated(np.array([50, 3, 2, 1]), 2, 0)  # the light device has 2 slots
    np.testing.assert_array_equal(full, [[1, 0], [0, 1], [0, 1], [1, 0]])
    plan = tools.rivals.split_evenly(np.array([91, 40, 20, 6, 4, 1]), replicas)
    np.testing.assert_array_equal(plan[0], [30, 30, 31])
    np.testing.assert_array_equal(plan.sum(1), [91, 40, 20, 6, 4, 1])


def test_the_papers_scenarios_have_the_papers_imbalance(tools):
    """The ideal speed-up, largest over mean load, of gpt-oss-120b."""
    found = {w.name: w for w in tools.workloads.paper_scenarios(1, 0) if w.group == "gpt-oss-120b"}
    assert len(found) == 13
    for name, want in {
        "balanced": 1.0,
        "30% into 16": 2.40,
        "30% into 4": 2.94,
        "50% into 4": 4.39,
        "80% into 16": 6.40,
        "95% into 16": 7.60,
        "95% into 1": 7.65,
    }.items():
        rows = np.asarray(planners.native(found[name].loads[0, 0], 8)).sum(0)
        assert rows.max() / rows.mean() == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("model", ["gpt-oss-120b", "DeepSeek-V3", "Kimi-K2"])
def test_rebalancing_evens_out_the_papers_scenarios(tools, model):
    """Largest over mean load: at most alpha (and a row), in one round of the default transport."""
    num_experts, tokens, choices = tools.workloads.MODELS[model]
    found = [w for w in tools.workloads.paper_scenarios(1, 0) if w.group == model]
    loads = np.concatenate([w.loads[0] for w in found]).astype(np.int32)
    defaults = LeastLoaded()
    rows = math.ceil(defaults.skip_below * tokens * choices)

    def plan(loads):
        return rebalance(
            *(loads, 8),
            alpha=1.05,
            skip_below=defaults.skip_below,
            min_chunk=defaults.min_chunk,
            num_rows=rows,
            num_slots=defaults.num_slots,
        )

    plans = jax.jit(functools.partial(jax.lax.map, plan))(loads)
    np.testing.assert_array_equal(plans.rows.sum(2), loads)
    for workload, planned in zip(found, np.asarray(plans.rows), strict=True):
        most, total = planned.sum(0).max(), planned.sum()
        assert most <= math.ceil(1.05 * total / 8), workload.name
        percent, _, hot = workload.name.partition("% into ")
        if hot:  # before: the hot experts and the first device's share of the others
            hot, share = int(hot), int(percent) / 100
            others = (num_experts // 8 - hot) / (num_experts - hot)
            before = workload.loads[0, 0].reshape(8, -1).sum(1).max() / (total / 8)
            assert before == pytest.approx(8 * (share + (1 - share) * others), rel=0.01)


def test_beliefs_know_only_what_was_before(tools):
    loads = np.array([[[4, 0]], [[0, 8]], [[2, 2]]])
    known = tools.measure._beliefs(loads, 0.75)
    np.testing.assert_array_equal(known["EPLB old"][1:], loads[:-1])
    np.testing.assert_array_equal(known["EPLB average"][1:], [[[4, 0]], [[3, 2]]])


@pytest.mark.slow
def test_the_command_compares_all_planners_on_a_trace(tools, tmp_path, capsys):
    loads = random_loads(12, 16, 4, most=4000, seed=2).reshape(6, 2, 16) + 1
    trace, report = tmp_path / "recorded.npz", tmp_path / "report.json"
    np.savez(trace, loads=loads)
    words = f"--trace {trace} --num-devices 4 --calls 2 --json {report}"
    assert tools.command.main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "trace, N=16, P=4" in printed
    assert "microseconds per plan" in printed
    found = {r["planner"]: r for r in json.loads(report.read_text())["results"]}
    native = found["native"]
    load = loads[1:].reshape(5, 2, 4, 4).sum(3)
    assert native["before"] == native["after"]
    assert native["after"] == pytest.approx((load.max(2) / load.mean(2)).mean())
    assert (native["most_foreign"], native["copies"]) == (0, 0)
    assert found["one owner"]["worst"] < 1.1 < found["native"]["worst"]
    assert found["wrap"]["copies"] > 0
    assert len(found) == 10
    assert all(r["microseconds"] > 0 for r in found.values())


def test_a_phase_counts_its_own_steps_and_knows_those_before(tools, tmp_path):
    loads = np.arange(7 * 2 * 4).reshape(7, 2, 4)
    np.savez(tmp_path / "x.npz", loads=loads)
    phases = tools.workloads.recorded(tmp_path / "x.npz", 2, phases=3)
    assert [p.name for p in phases] == ["steps 2 to 3", "steps 4 to 5", "steps 6 to 7"]
    counted = [p.loads[p.history :] for p in phases]
    np.testing.assert_array_equal(np.concatenate(counted), loads[1:])
    first_layer_only = phases[1].loads * np.array([[1], [0]])  # the second layer has no rows
    workload = tools.workloads.Workload("", "", first_layer_only, 2, history=3)
    native = np.zeros((*workload.loads.shape, 2), np.int64)
    native[..., :2, 0], native[..., 2:, 1] = workload.loads[..., :2], workload.loads[..., 2:]
    steps = [load[2:].sum() / (load.sum() / 2) for load in loads[3:5, 0]]
    assert tools.measure._result("", workload, native, 0.0).worst == pytest.approx(max(steps))


@pytest.mark.parametrize(
    "arrays, what",
    [
        ({"other": np.zeros(3)}, "has no array 'loads'; it has other"),
        ({"loads": np.zeros((2, 3, 16))}, "must be integers .steps, layers, experts.; it is float"),
        ({"loads": np.zeros((2, 1, 10), int)}, "10 experts, not a multiple of 8 devices"),
        ({"loads": np.zeros((3, 1, 8), int)}, "3 steps, too few for 2 phases"),
    ],
)  # fmt: skip
def test_a_trace_that_does_not_fit_is_refused(tools, tmp_path, capsys, arrays, what):
    trace = tmp_path / "bad.npz"
    np.savez(trace, **arrays)
    with pytest.raises(SystemExit):
        tools.command.main(["--trace", str(trace), "--phases", "2"])
    assert re.search(what, capsys.readouterr().err)


def test_the_log_of_a_run_is_a_trace(tools, tmp_path):
    run = {"tokens_per_step": 100, "k": 2, "moe_layers": [0, 1]}
    share = [[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]]
    records = [
        {"kind": "run", "step": 0, "time": 0.0, "values": run},
        {"kind": "train", "step": 1, "time": 1.0, "values": {"router/load": share}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (found,) = tools.workloads.recorded(tmp_path, 2)
    np.testing.assert_array_equal(found.loads, [[[100, 50, 50, 0], [20, 40, 60, 80]]])
