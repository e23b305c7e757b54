"""`moejax verify-kernels`: its table, its exit status, and what --accept changes."""

import pytest

from moejax.commands import main
from moejax.kernels import accepted, verification
from moejax.kernels.expert_mlp import conformance as mlp_kit
from moejax.kernels.grouped_matmul import conformance as kit
from moejax.kernels.grouped_matmul import implementations, tile_scan

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
    monkeypatch.setattr(verification, "ACTIVATIONS", ("silu",))
    monkeypatch.setattr(verification, "CPU", verification.Timing(64, 16, 32, 4, 2))


def test_prints_a_table_and_stores_nothing_unless_told(capsys):
    assert main(["verify-kernels", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
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
    result = verification.verify("tile_scan", "float32")
    assert result.failures == ["RuntimeError: no such instruction"] * 2
    assert not result.may_be_chosen


def test_unknown_implementation(capsys):
    assert main(["verify-kernels", "--implementation", "cublas"]) == 2
    assert "no implementation 'cublas'; use one of tile_scan" in capsys.readouterr().err
