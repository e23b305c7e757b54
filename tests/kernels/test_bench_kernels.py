"""`tools/bench_kernels.py` at a tiny size: what it measures, what it refuses to call right."""

import importlib
import json
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
PRODUCTS = ("gate_up", "dlhs", "drhs", "forward_backward", "glu", "expert_mlp", "expert_mlp_grad")


@pytest.fixture(scope="module")
def tools():
    """The modules of the benchmark, which find each other only from their folder."""
    sys.path.insert(0, str(TOOLS))
    parts = {n: f"kernel_bench.{n}" for n in ("cases", "checks", "libraries", "plot")}
    names = parts | {"command": "bench_kernels"}
    try:
        yield types.SimpleNamespace(**{n: importlib.import_module(m) for n, m in names.items()})
    finally:
        sys.path.remove(str(TOOLS))


def case_of(tools, product):
    model = tools.cases.Model("tiny", 32, 16, 5, 2, 40)
    return tools.cases.Case(model, product, "float32")


def reference(tools, case, sizes):
    args = (*case.operands(0), *case.routing(sizes, 0))
    return args, tools.checks.Reference(case, args, sizes)


def outputs(tools, case, args, name="moejax tile_scan"):
    (variant,) = (v for v in tools.libraries.variants() if v.name == name)
    out = variant.function(case)(*args)
    return list(out) if isinstance(out, tuple) else [out]


SIZES = np.array([7, 0, 33, 1, 39], np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_right_results_pass_the_check(tools, product):
    case = case_of(tools, product)
    args, expected = reference(tools, case, SIZES)
    assert expected.error(outputs(tools, case, args)) < tools.checks.tolerance(case)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_one_wrong_group_in_any_output_is_noticed(tools, product):
    case = case_of(tools, product)
    args, expected = reference(tools, case, SIZES)
    right = outputs(tools, case, args)
    for i, out in enumerate(right):
        # All of one group's rows, the matrix of the last group, or all tokens.
        bad = (
            out.at[40:].multiply(1.01)
            if out.shape[0] == SIZES.sum()
            else out.at[-1:].multiply(1.01)
        )
        bad = out * 1.01 if out.shape[0] == case.model.tokens else bad
        assert expected.error([*right[:i], bad, *right[i + 1 :]]) > tools.checks.tolerance(case)


@pytest.mark.parametrize("product", ["gate_up", "drhs"])
def test_nan_and_gradients_of_empty_groups_are_noticed(tools, product):
    case = case_of(tools, product)
    args, expected = reference(tools, case, SIZES)
    (out,) = outputs(tools, case, args)
    at = 0 if product == "gate_up" else 1
    assert not expected.error([out.at[at].set(jnp.nan)]) <= 1
    if product == "drhs":
        assert expected.error([out.at[1].set(out[0])]) > tools.checks.tolerance(case)


def test_distributions_give_every_row_to_a_group(tools):
    cases = tools.cases
    for model in cases.MODELS.values():
        sizes = {d: cases.group_sizes(d, model) for d in cases.DISTRIBUTIONS}
        assert {int(s.sum()) for s in sizes.values()} == {model.rows}
        assert np.count_nonzero(sizes["one"]) == 1
        assert np.count_nonzero(sizes["half_empty"]) == model.experts // 2
        assert np.sort(sizes["four"])[-4:].sum() > 0.75 * model.rows


@pytest.mark.long
def test_the_command_measures_and_says_what_it_could_not(tools, tmp_path, capsys):
    report, picture = tmp_path / "report.json", tmp_path / "a.png"
    words = "--models olmoe --scale 128 --rounds 2 --products gate_up,permute --distributions zipf"
    words = [*words.split(), "--variants", "tile_scan,gather,moejax tpu", "--json", str(report)]
    assert tools.command.main(words) == 0
    assert "1 rows: moejax tpu: it runs on TPU, and this is cpu" in capsys.readouterr().out
    found = json.loads(report.read_text())
    rows = {(r["product"], r["variant"]): r for r in found["rows"]}
    measured = rows["gate_up", "moejax tile_scan"]
    assert measured["status"] == "ok"
    assert len(measured["seconds"]) == 2
    assert measured["median"] > 0
    assert measured["flops"] == 2 * 1024 * 16 * 2 * 16
    assert rows["permute", "moejax gather"]["status"] == "ok"
    assert rows["gate_up", "moejax tpu"]["status"] == "cannot run"
    assert found["ceilings"]["flops"] > 0
    tools.plot.main([str(report), "--out", str(picture)])
    assert picture.stat().st_size > 1000


@pytest.mark.slow
def test_out_of_time_is_reported(tools, tmp_path):
    report = tmp_path / "report.json"
    words = f"--models olmoe --scale 128 --products gate_up --seconds 0 --json {report}"
    assert tools.command.main(words.split()) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {(r["status"], r["reason"]) for r in rows} == {("not measured", "out of time")}
    assert len(rows) == 5
