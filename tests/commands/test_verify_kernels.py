"""`moejax verify-kernels`: its table, its exit status, and what --accept changes."""

import numpy as np
import pytest

from moejax.commands import main
from moejax.kernels import accepted, compat, least_loaded, verification
from moejax.kernels.block_attention import conformance as block_kit
from moejax.kernels.expert_mlp import conformance as mlp_kit
from moejax.kernels.full_attention import conformance as attention_kit
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import implementations, tile_scan
from moejax.kernels.least_loaded import conformance as plan_kit
from moejax.kernels.verification import (
    Result,
    block_attention,
    full_attention,
    grouped_matmul,
)

LOADS = np.int32([90, 0, 80, 0])
PLANS = ["verify-kernels", "--dtype", "int32"]
ACCEPT_TILE_SCAN = [
    "verify-kernels",
    "--accept",
    "--dtype",
    "float32",
    "--implementation",
    "tile_scan",
]


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Fewer cases, smaller sizes, and a store of our own."""
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))
    monkeypatch.setattr(kit, "CASES", kit.CASES[:8:4])
    monkeypatch.setattr(kit, "OFFSET_CASES", kit.OFFSET_CASES[:1])
    monkeypatch.setattr(kit, "SHAPE_CASES", kit.SHAPE_CASES[-1:])
    monkeypatch.setattr(kit, "WIDE_CASES", kit.SHAPE_CASES[:1])
    monkeypatch.setattr(plan_kit, "CASES", plan_kit.CASES[5:6])
    monkeypatch.setattr(block_kit, "CASES", block_kit.CASES[:1])
    monkeypatch.setattr(block_attention, "CPU", block_attention.Sizes(96, 2, 1, 8, 8, 2))
    monkeypatch.setattr(attention_kit, "CASES", attention_kit.CASES[-1:])
    monkeypatch.setattr(full_attention, "CPU", full_attention.Sizes(1, 32, 2, 1, 8))
    monkeypatch.setattr(grouped_matmul, "ACTIVATIONS", ("silu",))
    monkeypatch.setattr(grouped_matmul, "CPU", grouped_matmul.Sizes(64, 16, 32, 4))
    for kernel in verification.KERNELS:
        monkeypatch.setattr(kernel, "ROUNDS", 2)


@pytest.fixture
def simulated_tpu(monkeypatch):
    """A device on which `pallas` runs, simulated, and is the faster of the two."""
    monkeypatch.setattr(compat, "target_platform", lambda: "tpu")
    monkeypatch.setattr(compat, "target_device_kind", lambda: "TPU v5")
    clock = lambda calls, rounds: {n: {"jnp": 2.0, "pallas": 1.0}[n] for n in calls}
    monkeypatch.setattr(verification, "_medians", clock)
    with compat.interpret_tpu():
        yield


def printed_lines(capsys):
    out = capsys.readouterr().out
    return out, {line.split()[0]: line for line in out.splitlines() if line.strip()}


@pytest.mark.slow
def test_prints_a_table_and_stores_nothing_unless_told(capsys):
    assert main(["verify-kernels", "--dtype", "float32"]) == 0
    out, lines = printed_lines(capsys)
    assert "block_attention, float32: 96 keys" in out
    assert "1 passed" in lines["packed"]
    assert "grouped_matmul, float32: 64 rows" in out
    assert "least_loaded" not in lines  # plans are of int32
    assert "passed" in lines["tile_scan"]
    assert "never chosen" in lines["xla"]
    assert "cannot serve: it runs on TPU, and this is cpu" in lines["tpu"]
    assert lines["fastest"].split()[1:] == ["tile_scan"] * 4
    assert "nothing was stored" in out
    assert not accepted.path().exists()


def test_accept_makes_it_the_default(capsys, monkeypatch):
    monkeypatch.setattr(accepted, "SHIPPED", {})
    assert main(ACCEPT_TILE_SCAN) == 0
    found = accepted.look_up("grouped_matmul", "float32", "cpu", implementations.Choice._fields)
    assert set(found.choices.values()) == {"tile_scan"}
    assert "stored in" in capsys.readouterr().out


def test_the_plan_is_checked_and_what_cannot_run_here_is_said(capsys):
    assert main([*PLANS, "--accept"]) == 0
    out, lines = printed_lines(capsys)
    assert "least_loaded, int32: 256 experts on 64 devices" in out
    checks, state, milliseconds = lines["jnp"].split()[1:]
    assert (checks, state) == ("1", "passed")
    assert 0 < float(milliseconds) < 1000
    assert "cannot serve: it runs on TPU, and this is cpu" in lines["pallas"]
    assert lines["fastest"].split()[1:] == ["jnp"]
    found = accepted.look_up("least_loaded", "int32", "cpu", ("plan",))
    assert found.choices == {"plan": "jnp"}
    assert "accepted by moejax verify-kernels" in found.source


@pytest.mark.slow
@pytest.mark.usefixtures("simulated_tpu")
def test_an_accepted_plan_kernel_is_the_default_there(capsys, monkeypatch):
    pallas = least_loaded.module("pallas")
    traced, right = [], pallas.plan
    monkeypatch.setattr(pallas, "plan", lambda *a: traced.append(a) or right(*a))
    plan = lambda: least_loaded.least_loaded_plan(LOADS, 2, capacity=99, min_chunk=1)
    plan()
    assert not traced
    assert main([*PLANS, "--accept"]) == 0
    _, lines = printed_lines(capsys)
    assert lines["pallas"].split() == ["pallas", "1", "passed", "2000.000"]
    assert lines["fastest"].split()[1:] == ["pallas"]
    traced.clear()
    plan()
    assert len(traced) == 1
    monkeypatch.setattr(accepted, "sources_hash", lambda: "changed")
    traced.clear()
    plan()
    assert not traced


@pytest.mark.usefixtures("simulated_tpu")
def test_a_wrong_plan_kernel_is_named_and_never_chosen(capsys, monkeypatch):
    pallas = least_loaded.module("pallas")
    right = pallas.plan
    monkeypatch.setattr(pallas, "plan", lambda *a: right(*a).at[0, 0].add(1))
    assert main([*PLANS, "--accept"]) == 1
    out, lines = printed_lines(capsys)
    assert "1 FAILED" in lines["pallas"]
    assert "forced, then displaced: plan[0, 0] is " in out
    found = accepted.look_up("least_loaded", "int32", "TPU v5", ("plan",))
    assert found.choices == {"plan": "jnp"}


def test_attention_is_checked_and_its_definition_never_chosen(capsys):
    arguments = ["verify-kernels", "--dtype", "float32", "--accept"]
    for name in ("reference", "scan", "cudnn", "splash"):
        arguments += ["--implementation", name]
    assert main(arguments) == 0
    out, lines = printed_lines(capsys)
    assert "full_attention, float32: 1 x 32 positions, 2 heads of 8 on 1" in out
    assert lines["scan"].split()[1:3] == ["1", "passed"]
    assert "never chosen" in lines["reference"]
    assert "cannot serve: it runs on NVIDIA GPUs, and this is cpu" in lines["cudnn"]
    assert "cannot serve: it runs on TPU, and this is cpu" in lines["splash"]
    assert lines["fastest"].split()[1:] == ["scan"]
    found = accepted.look_up("full_attention", "float32", "cpu", ("attention",))
    assert found.choices == {"attention": "scan"}


def test_accepting_one_kernel_keeps_the_other():
    accepted.store("cpu", {"grouped_matmul": {"float32": {"forward": "xla"}}}, {})
    assert main([*PLANS, "--accept"]) == 0
    assert accepted.look_up("grouped_matmul", "float32", "cpu", ()).choices == {"forward": "xla"}
    assert accepted.look_up("least_loaded", "int32", "cpu", ()).choices == {"plan": "jnp"}


@pytest.mark.slow
def test_a_wrong_kernel_is_named_and_never_chosen(capsys, monkeypatch):
    right = tile_scan.grad_rhs
    wrong = lambda *a, **k: right(*a, **k).at[-1, 0].add(1)
    monkeypatch.setattr(tile_scan, "grad_rhs", wrong)
    kit._compiled.cache_clear()
    assert main(ACCEPT_TILE_SCAN) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "grad_rhs, all of size one: relative error" in out or "grad_rhs, balanced: rel" in out
    assert not accepted.path().exists()
    kit._compiled.cache_clear()


def test_a_kernel_that_raises_is_a_failure(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(mlp_kit, "failures", broken)
    result = verification.verify(grouped_matmul, "tile_scan", "float32")
    assert result.failures == ["RuntimeError: no such instruction"] * 2
    assert not result.may_be_chosen


def test_a_kernel_that_fails_only_when_timed_is_named_and_never_chosen(capsys, monkeypatch):
    """The others are timed and accepted all the same."""
    monkeypatch.setattr(compat, "has_ragged_dot", lambda: True)  # so that xla is timed too
    right = tile_scan.grad_rhs

    def wrong(lhs, dout, *args, **options):
        if lhs.shape[0] == grouped_matmul.CPU.rows:
            raise RuntimeError("out of memory")
        return right(lhs, dout, *args, **options)

    monkeypatch.setattr(tile_scan, "grad_rhs", wrong)
    monkeypatch.setattr(verification, "verify", lambda kernel, name, dtype: Result(name, dtype))
    both = [*ACCEPT_TILE_SCAN, "--implementation", "xla"]
    assert main(both) == 1
    out, lines = printed_lines(capsys)
    assert lines["tile_scan"].split() == ["tile_scan", "1", "FAILED"]  # and no times
    assert "    grad_rhs of 64 rows, 16 to 32 wide, 4 groups: RuntimeError: out of memory" in out
    assert lines["fastest"].split()[1:] == ["xla"] * 4
    found = accepted.look_up("grouped_matmul", "float32", "cpu", ())
    assert set(found.choices.values()) == {"xla"}


def test_unknown_implementation(capsys):
    assert main(["verify-kernels", "--implementation", "cublas"]) == 2
    message = capsys.readouterr().err
    assert "no implementation 'cublas'; use one of scan, packed" in message
    assert "jnp, pallas" in message


def test_an_implementation_without_such_operands(capsys):
    words = ["--implementation", "pallas", "--dtype", "float32"]
    assert main(["verify-kernels", *words]) == 2
    assert "pallas has no operands of float32; leave out --dtype" in capsys.readouterr().err
