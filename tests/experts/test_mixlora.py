"""MixLoRA against its definition: every expert a whole adapted MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.dense import DenseGLU
from moejax.experts.mixlora import MixLoRA
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.router import TopK
from moejax.layers.reports import REPORTS, told
from moejax.types import named_leaves
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8)), jnp.float32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
CONTEXT = make_context(MASK)
BANK = LoRABank(num_adapters=4, rank=3, alpha=6.0)
PROJECTIONS = ("gate", "up", "down")


def silu(x):
    return x / (1 + np.exp(-x))


def by_definition(variables, targets, k):
    kernels = {p: np.asarray(variables["params"][p]["kernel"]) for p in PROJECTIONS}
    x = np.asarray(X).reshape(-1, 8)
    logits = x @ np.asarray(variables["lora"]["routing"]["gate"]["kernel"])
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = np.zeros_like(x)
    for t in range(len(x)):
        chosen = np.argsort(-probs[t])[:k]
        for e in chosen:
            w = dict(kernels)
            for p in targets:
                bank = variables["lora"][f"{p}_adapters"]
                w[p] = kernels[p] + 2.0 * np.asarray(bank["a"][e]) @ np.asarray(bank["b"][e])
            weight = probs[t, e] / probs[t, chosen].sum()
            y[t] += weight * ((silu(x[t] @ w["gate"]) * (x[t] @ w["up"])) @ w["down"])
    return y.reshape(X.shape), probs


@pytest.mark.parametrize(
    "targets, k", [(PROJECTIONS, 2), (PROJECTIONS, 1), (("gate", "down"), 3), (("up",), 2)]
)
def test_equals_its_definition(targets, k):
    chosen = None if targets == PROJECTIONS else targets
    module = MixLoRA(d_ff=12, router=TopK(k=k), bank=BANK, targets=chosen)
    variables = random_variables(module, X, CONTEXT)
    expected, _ = by_definition(variables, targets, k)
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_fresh_it_is_the_mlp_that_it_replaces_bit_for_bit():
    module, plain = MixLoRA(d_ff=12, gated=True, bank=BANK), DenseGLU(d_ff=12, gated=True)
    variables = quick_jit(module.init)(jax.random.key(0), X, CONTEXT)
    params = quick_jit(plain.init)(jax.random.key(0), X, CONTEXT)["params"]
    assert named_leaves(variables["params"]).keys() == named_leaves(params).keys()
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    expected = quick_jit(plain.apply)({"params": params}, X, CONTEXT)
    np.testing.assert_array_equal(y, expected)


def test_the_balance_loss_is_k_where_all_are_used_alike_and_counts_no_padding():
    module = MixLoRA(d_ff=12, router=TopK(k=2, balance_weight=1e-3), bank=BANK)
    variables = random_variables(module, X, CONTEXT)
    run = quick_jit(lambda v: told(module.apply(v, X, CONTEXT, mutable=[REPORTS])[1]).terms)
    total, count = run(variables)["adapter_balance"]
    _, probs = by_definition(variables, (), 2)
    probs = probs.reshape(2, 4, 4)
    chosen = probs >= np.sort(probs, -1)[..., -2:-1]
    expected = sum(
        n * 4 * (chosen[row, :n].mean(0) * probs[row, :n].mean(0)).sum()
        for row, n in ((0, 4), (1, 2))
    )
    assert count == 6
    assert float(total) == pytest.approx(expected, rel=1e-5)
    routing = jax.tree.map(jnp.zeros_like, variables["lora"]["routing"])
    total, count = run(variables | {"lora": variables["lora"] | {"routing": routing}})[
        "adapter_balance"
    ]
    assert float(total / count) == pytest.approx(2, rel=1e-6)
    assert module.loss_weights == {"adapter_balance": 1e-3}
