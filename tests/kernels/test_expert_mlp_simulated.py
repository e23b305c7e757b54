"""expert_mlp on TPU and Hopper kernels, in Pallas's simulators."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels import compat
from moejax.kernels.expert_mlp import conformance as kit
from moejax.kernels.expert_mlp import expert_mlp
from moejax.kernels.expert_mlp import tile_scan as fused_tile_scan
from moejax.kernels.expert_mlp.grouped import GroupedExperts
from moejax.kernels.grouped_matmul import tile_scan
from moejax.kernels.grouped_matmul.implementations import Choice

NO_SIMULATOR = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="Mosaic GPU's simulator needs jax 0.11.2"
)
SIMULATORS = {"tpu": compat.interpret_tpu, "hopper": compat.interpret_gpu}
NAMES = ["tpu", pytest.param("hopper", marks=NO_SIMULATOR)]


@contextlib.contextmanager
def simulator(name):
    with SIMULATORS[name](detect_races=True):
        yield


@pytest.mark.parametrize(
    "activation, biased",
    [
        ("silu", False),
        pytest.param("swiglu_clamped", True, marks=pytest.mark.slow),
        pytest.param("gelu", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients(name, activation, biased):
    with simulator(name):
        options = {"dtype": "bfloat16", "activation": activation, "biased": biased}
        assert not kit.failures(name, **options)


@pytest.mark.long
def test_float32_on_tpu_kernels():
    with simulator("tpu"):
        assert not kit.failures("tpu", dtype="float32", activation="silu", biased=True)


@pytest.mark.parametrize("name", NAMES)
def test_saves_x_preactivations_scores_and_indices_exactly(name):
    """As on CPU (test_expert_mlp.py): no gathered copy of x, no y, no h."""
    t, d, f, e, k = 20, 64, 128, 4, 2
    rows = t * k
    shapes = [(t, d), (e, d, f), (e, d, f), (e, f, d)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    weights = jax.ShapeDtypeStruct((t, k), jnp.float32)
    experts = jax.ShapeDtypeStruct((t, k), jnp.int32)

    def saved(x, gate, up, down, weights, experts):
        call = lambda *a: expert_mlp(*a[:4], experts, a[4], implementation=name)
        _, vjp = jax.vjp(call, x, gate, up, down, weights)
        return jax.tree.leaves(vjp)

    with simulator(name):
        leaves = jax.eval_shape(saved, *arrays, weights, experts)
    num_bytes = sum(leaf.dtype.itemsize * leaf.size for leaf in leaves)
    activations = 2 * (t * d + 2 * rows * f)
    scores_and_indices = 4 * rows + 4 * (2 * rows + e)
    assert num_bytes == activations + scores_and_indices + 2 * 3 * e * d * f


def test_the_kit_finds_a_wrong_expert(monkeypatch):
    def wrong(lhs, dout, groups, **options):
        drhs = right(lhs, dout, groups, **options)
        return drhs.at[2].set(drhs[1])

    right = tile_scan.grad_rhs
    monkeypatch.setattr(tile_scan, "grad_rhs", wrong)
    grouped = GroupedExperts(Choice(*["tile_scan"] * 4))
    monkeypatch.setattr(fused_tile_scan, "forward", grouped.forward)
    monkeypatch.setattr(fused_tile_scan, "backward", grouped.backward)
    found = kit.failures("tile_scan", dtype="float32", activation="silu", biased=False)
    names = [re.fullmatch(r"expert_mlp \(silu\): (\w+) is off by .*", f).group(1) for f in found]
    assert names == ["dw_gate", "dw_up", "dw_down"]
