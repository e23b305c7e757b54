"""Each product may run on another implementation: the mixture is as right as its parts."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.kernels import accepted, dispatch
from moejax.kernels.expert_mlp import conformance as mlp_kit
from moejax.kernels.grouped_matmul import grouped_matmul, reference, tile_scan, xla
from moejax.kernels.grouped_matmul.implementations import Choice

MIXED = Choice(forward="xla", grad_lhs="tile_scan", grad_rhs="xla", glu="tile_scan")


@pytest.fixture(autouse=True)
def accept(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))
    accepted.store("cpu", {"grouped_matmul": {"float32": MIXED._asdict()}}, {})
    dispatch._announce.cache_clear()
    yield
    dispatch._announce.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """(implementation, product) of every product that is traced."""
    seen = []

    def watch(module, product):
        run = getattr(module, product)

        def spy(*args, **options):
            seen.append((module.__name__.split(".")[-1], product))
            return run(*args, **options)

        monkeypatch.setattr(module, product, spy)

    for module in (tile_scan, xla):
        for product in ("forward", "grad_lhs", "grad_rhs"):
            watch(module, product)
    return seen


def test_grouped_matmul_takes_each_product_from_its_own(calls, caplog):
    rng = np.random.default_rng(0)
    lhs, rhs, dout = (
        jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((30, 8), (3, 8, 5), (30, 5))
    )
    sizes = jnp.asarray([10, 0, 15])
    with caplog.at_level(logging.INFO):
        out, vjp = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes), lhs, rhs)
        got = out, *vjp(dout)
    used = {call for call in calls if call not in {("tile_scan", "forward"), ("xla", "forward")}}
    assert used == {("tile_scan", "grad_lhs"), ("xla", "grad_rhs")}
    assert ("xla", "forward") in calls
    want = reference.grouped_matmul(lhs, rhs, sizes), *reference.gradients(lhs, rhs, sizes, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert "forward by 'xla', grad_lhs by 'tile_scan'" in caplog.text


def test_expert_mlp_on_a_mixture(calls):
    options = {"dtype": "float32", "activation": "silu", "biased": True}
    assert not mlp_kit.failures(None, **options)
    assert {("tile_scan", "grad_lhs"), ("xla", "grad_rhs"), ("xla", "forward")} < set(calls)
