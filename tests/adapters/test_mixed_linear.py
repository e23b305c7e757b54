"""A mixture beside a projection against a plain loop over its adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.comol import CoMoL
from moejax.adapters.dynmole import EntropySwitch
from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.adapters.remix import PlackettLuce
from moejax.errors import UserError
from moejax.experts.mixlora import MixLoRA
from moejax.layers.linear import Linear
from moejax.layers.mixing.bank import LoRABank, RsLoRABank
from moejax.layers.mixing.granularity import Sequence, Static, Task, Token
from moejax.layers.mixing.ragged import pays
from moejax.layers.mixing.router import Softmax, TopK
from moejax.layers.reports import REPORTS, told
from moejax.layers.row_keys import row_keys
from moejax.verification.contracts.cases import make_context, quick_jit, random_variables

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
TASKS = jnp.asarray([[2] * 5, [0] * 5])
CONTEXT = make_context(MASK, segment_ids=SEGMENTS, task_ids=TASKS)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def built(**settings):
    module = MixedLinear(features=6, **settings)
    variables = random_variables(module, X, CONTEXT)
    base = Linear(features=6).apply({"params": variables["params"]}, X, CONTEXT)
    return module, variables, np.asarray(base)


def by_loop(variables, base, weights, scale):
    a, b = (np.asarray(variables["lora"]["adapters"][name]) for name in ("a", "b"))
    y = base.copy()
    for e in range(a.shape[0]):
        y += scale * weights[..., e, None] * (np.asarray(X) @ a[e] @ b[e])
    return y


def logits(variables, seen):
    return seen @ np.asarray(variables["lora"]["routing"]["gate"]["kernel"])


@pytest.mark.parametrize(
    "bank, num_adapters, scale",
    [(LoRABank, 4, 6 / 4), (RsLoRABank, 4, 6 / 2), (LoRABank, 30, 6 / 4)],
)
def test_equals_a_loop_over_the_adapters(bank, num_adapters, scale):
    """The thirty are computed on sorted rows."""
    assert pays(num_adapters, 2) == (num_adapters == 30)
    module, variables, base = built(
        router=TopK(k=2), bank=bank(num_adapters=num_adapters, rank=4, alpha=6.0)
    )
    probs = softmax(logits(variables, np.asarray(X)))
    kept = np.where(probs >= np.sort(probs, -1)[..., -2:-1], probs, 0)
    weights = kept / kept.sum(-1, keepdims=True)
    y, reports = quick_jit(lambda v: module.apply(v, X, CONTEXT, mutable=[REPORTS]))(variables)
    np.testing.assert_allclose(y, by_loop(variables, base, weights, scale), rtol=1e-4, atol=1e-5)
    total, count = told(reports).measures["support_size"]
    assert count == MASK.sum()
    size = weights.sum(-1) ** 2 / np.square(weights).sum(-1)
    assert float(total) == pytest.approx(size[MASK].sum(), rel=1e-5)


def seen_by(granularity):
    """What the gate sees, in numpy."""
    x = np.asarray(X)
    if isinstance(granularity, Static):
        return np.ones((2, 1, 1))
    if isinstance(granularity, Task):
        return np.eye(3)[[2, 0]][:, None]
    means = np.zeros_like(x)
    for b, s in np.ndindex(2, 5):
        own = [t for t in range(s + 1) if SEGMENTS[b, t] == SEGMENTS[b, s] and MASK[b, t]]
        means[b, s] = x[b, own].mean(0) if own else 0
    return means


@pytest.mark.parametrize("granularity", [Sequence(), Task(num_tasks=3), Static()])
def test_what_a_gate_sees(granularity):
    bank = LoRABank(num_adapters=3, rank=2, alpha=2.0)
    module, variables, base = built(router=Softmax(granularity=granularity), bank=bank)
    weights = softmax(logits(variables, seen_by(granularity)))
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    expected = by_loop(variables, base, np.broadcast_to(weights, (2, 5, 3)), 1.0)
    np.testing.assert_allclose(np.asarray(y)[MASK], expected[MASK], rtol=1e-4, atol=1e-5)


def test_one_adapter_is_lora():
    module, variables, _ = built(router=TopK(k=1), bank=LoRABank(num_adapters=1, rank=3, alpha=5.0))
    plain = LoRA(features=6, rank=3, alpha=5.0)
    own = {name: variables["lora"]["adapters"][name][0] for name in ("a", "b")}
    expected = quick_jit(plain.apply)({"params": variables["params"], "lora": own}, X, CONTEXT)
    np.testing.assert_allclose(
        quick_jit(module.apply)(variables, X, CONTEXT), expected, rtol=1e-5, atol=1e-5
    )


def test_the_order_of_the_adapters_does_not_matter():
    module, variables, _ = built(bank=LoRABank(num_adapters=4, rank=2))
    order = np.array([2, 0, 3, 1])
    adapters = jax.tree.map(lambda leaf: leaf[order], variables["lora"]["adapters"])
    routing = jax.tree.map(lambda leaf: leaf[:, order], variables["lora"]["routing"])
    other = variables | {"lora": {"adapters": adapters, "routing": routing}}
    run = quick_jit(module.apply)
    np.testing.assert_allclose(
        run(other, X, CONTEXT), run(variables, X, CONTEXT), rtol=1e-5, atol=1e-5
    )


def test_only_weights_that_all_share_can_be_merged():
    bank = LoRABank(num_adapters=3, rank=2, alpha=3.0)
    module, variables, _ = built(router=Softmax(granularity=Static()), bank=bank)
    matrix = module.bind(variables).matrix(jnp.float32)
    y = quick_jit(module.apply)(variables, X, CONTEXT)
    np.testing.assert_allclose(y, X @ matrix, rtol=1e-4, atol=1e-5)
    module, variables, _ = built(bank=bank)
    with pytest.raises(UserError, match="weighed for every token anew"):
        module.bind(variables).matrix(jnp.float32)


@pytest.mark.parametrize("granularity", [Token(), Static()])
def test_sorted_rows_give_what_all_adapters_give(monkeypatch, granularity):
    """Values and gradients, with dropout, with adapters that nobody chose and one that all did."""
    module, variables, _ = built(
        router=TopK(k=2, granularity=granularity),
        bank=LoRABank(num_adapters=6, rank=3, dropout=0.3),
    )
    context = CONTEXT.replace(key=row_keys(jax.random.key(0), 2))
    found = {}
    for sort in (False, True):
        monkeypatch.setattr("moejax.layers.mixing.bank.pays", lambda *_, sort=sort: sort)
        loss = lambda v, x: jnp.sum(jnp.sin(module.apply(v, x, context)))
        found[sort] = quick_jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables, X)
    for dense, ragged in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(ragged, dense, rtol=1e-4, atol=1e-5)


def largest_array(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


def test_nothing_is_as_large_as_tokens_times_adapters_times_width():
    """Forward and backward: the largest array is the projection's, or tokens x E x rank."""
    num_adapters, rank, width, length = 8, 4, 96, 256
    module = MixedLinear(features=width, bank=LoRABank(num_adapters=num_adapters, rank=rank))
    x = jnp.zeros((1, length, width))
    context = make_context(np.ones((1, length), bool))
    variables = random_variables(module, x, context)
    loss = lambda v, x: jnp.sum(jnp.sin(module.apply(v, x, context)))
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables, x)
    limit = max(length * width, length * num_adapters * rank)
    assert largest_array(jaxpr.jaxpr) <= limit < length * num_adapters * width


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"bank": LoRABank(rank=0)}, "bank.rank=0 must be at least 1"),
        ({"bank": LoRABank(num_adapters=0)}, "bank.num_adapters=0 must be at least 1"),
        ({"bank": LoRABank(dropout=1.0)}, r"bank.dropout=1.0 must be in \[0, 1\)"),
        ({"router": TopK(k=0)}, "router.k=0 must be between 1 and the number of adapters, 8"),
    ],
)
def test_bad_settings_say_so(settings, text):
    with pytest.raises(UserError, match=text):
        MixedLinear(features=6, **settings).init(jax.random.key(0), X, CONTEXT)


def test_routing_by_task_without_task_ids_is_refused():
    module, variables, _ = built(router=Softmax(granularity=Task(num_tasks=3)))
    with pytest.raises(UserError, match="routes by task, and no task ids were given"):
        module.apply(variables, X, CONTEXT.replace(task_ids=None))


BY_TASK = {"granularity": Task(num_tasks=3)}
MANY = LoRABank(num_adapters=30, rank=2)  # computed on sorted rows
ROUTED_BY_TASK = {
    "Softmax": MixedLinear(features=6, router=Softmax(**BY_TASK)),
    "TopK": MixedLinear(features=6, router=TopK(**BY_TASK)),
    "TopK of 1": MixedLinear(features=6, router=TopK(k=1, **BY_TASK)),
    "TopK of 1, sorted": MixedLinear(features=6, router=TopK(k=1, **BY_TASK), bank=MANY),
    "PlackettLuce": MixedLinear(features=6, router=PlackettLuce(**BY_TASK)),
    "PlackettLuce, sorted": MixedLinear(features=6, router=PlackettLuce(**BY_TASK), bank=MANY),
    "EntropySwitch": MixedLinear(features=6, router=EntropySwitch(**BY_TASK)),
    "CoMoL": CoMoL(features=6, router=Softmax(**BY_TASK)),
    "MixLoRA": MixLoRA(d_ff=6, router=TopK(**BY_TASK)),
    "MixLoRA of 1": MixLoRA(d_ff=6, router=TopK(k=1, **BY_TASK)),
    "MixLoRA of 1, not down": MixLoRA(d_ff=6, router=TopK(k=1, **BY_TASK), targets=("gate", "up")),
}


@pytest.mark.parametrize("drawn", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", ROUTED_BY_TASK)
def test_a_task_that_the_router_does_not_know_is_nan_and_no_other_task(name, drawn):
    module = ROUTED_BY_TASK[name]
    context = CONTEXT.replace(key=row_keys(jax.random.key(0), 2) if drawn else None)
    variables = random_variables(module, X, context)
    run = quick_jit(lambda tasks: module.apply(variables, X, context.replace(task_ids=tasks)))
    for unknown in (-1, 3):
        y = run(jnp.full(X.shape[:2], 2).at[0].set(unknown))
        assert jnp.isnan(y[0]).all()
        assert jnp.isfinite(y[1:]).all()
