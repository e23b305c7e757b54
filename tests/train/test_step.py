"""One optimiser step: exact under accumulation, frozen by a bad gradient, blind to padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.balance.load_balance import (
    LaggedLoadBalance,
    SequenceLoadBalance,
    ShardLoadBalance,
    TwoPassLoadBalance,
)
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.z_loss import RouterZLoss
from moejax.objectives.lm import NextToken
from moejax.optim.guard import Guard
from moejax.train.state import TrainState, init_state
from moejax.train.step import _first_pass, make_train_step
from moejax.types import Batch
from tests.contract import quick_jit, to_dtype
from tests.models.tiny_model import (
    VOCAB,
    as_float64,
    attention,
    dense,
    moe,
    random_model_variables,
    tiny,
)

RULES = (
    SequenceLoadBalance(weight=0.3),
    TwoPassLoadBalance(weight=0.2),
    LaggedLoadBalance(weight=0.1),
    RouterZLoss(weight=0.05),
    LossFreeBias(rate=0.01),
)
TOKEN_BYTES = jnp.arange(VOCAB) % 3 + 1
GUARD = Guard(window=4, min_history=2)
LENGTHS = (7, 2, 5, 1)  # of the batch's sequences: very unequal padding


def model_with(balance=RULES, **changes):
    return tiny(attention=attention(qk_norm=None), ffn=moe(shared=None, balance=balance), **changes)


def make_batch(pad_token=0):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (4, 8))
    real = np.arange(8) < np.array(LENGTHS)[:, None] + 1  # inputs and the last target
    mask = np.arange(8) < np.array(LENGTHS)[:, None]
    targets = np.where(mask, np.roll(tokens, -1, axis=1), pad_token)
    positions = np.where(real, np.arange(8), 0)
    return Batch(
        tokens=jnp.asarray(np.where(real, tokens, pad_token), jnp.int32),
        targets=jnp.asarray(targets, jnp.int32),
        loss_mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(real, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
    )


NUM_TOKENS = sum(min(n + 1, 8) for n in LENGTHS)
NUM_TARGETS = sum(LENGTHS)


def make_state(model, optimizer, *, seed=0):
    variables = random_model_variables(model, seed=seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        router_state=variables.get("router_state", {}),
        opt_state=optimizer.init(variables["params"]),
        guard=GUARD.init(),
        key=jax.random.key(0),
    )


def make_step(model, optimizer, *, num_microbatches=1, objective=None):
    return make_train_step(
        model,
        objective or NextToken(z_weight=0.01),
        optimizer,
        GUARD,
        num_microbatches=num_microbatches,
        token_bytes=TOKEN_BYTES,
    )


@pytest.fixture(scope="module")
def exact():
    """{case: (state, metrics)} of one SGD step in float64: whole, in two parts, with remat."""
    optimizer = optax.sgd(0.1)
    with jax.enable_x64(True):
        model = as_float64(model_with())
        cases = {
            "whole": make_step(model, optimizer),
            "two": make_step(model, optimizer, num_microbatches=2),
            "two_remat": make_step(
                dataclasses.replace(model, remat="full"), optimizer, num_microbatches=2
            ),
        }
        state = to_dtype(make_state(model, optimizer), jnp.float64)
        run = {name: quick_jit(step) for name, step in cases.items()}
        out = {name: step(state, make_batch()) for name, step in run.items()}
        poisoned = _with_nan_pad_embedding(state, VOCAB - 1)
        out["poisoned"] = run["whole"](poisoned, _with_pad_token(VOCAB - 1))
        out["other_pad"] = run["whole"](state, make_batch(pad_token=3))
        return jax.device_get({k: (_numeric(s), m) for k, (s, m) in out.items()}) | {
            "before": jax.device_get(_numeric(state))
        }


def _numeric(state):
    return {name: getattr(state, name) for name in ("params", "opt_state", "router_state", "step")}


def _with_pad_token(token):
    """A batch whose padding is `token`, which no real position uses."""
    batch = make_batch(pad_token=token)
    real = batch.segment_ids > 0
    tokens = jnp.where(real & (batch.tokens == token), 1, batch.tokens)
    return dataclasses.replace(batch, tokens=tokens)


def _with_nan_pad_embedding(state, token):
    embedding = state.params["embed"]["embedding"].at[token].set(jnp.nan)
    params = state.params | {"embed": {"embedding": embedding}}
    return dataclasses.replace(state, params=params)


def assert_close(a, b, tolerance=1e-12):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, a, b)


@pytest.mark.parametrize("case", ["two", "two_remat"])
def test_accumulation_and_remat_change_nothing(exact, case):
    """Every sum, count, statistic, the loss, the gradient (by an SGD step) and router state."""
    (state, metrics), (other_state, other) = exact["whole"], exact[case]
    for name in ("loss", "terms", "measures", "stats", "grad_norm", "update_norm"):
        assert_close(metrics[name], other[name])
    assert_close(state, other_state)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state, exact["before"])
    assert all(leaf > 0 for leaf in jax.tree.leaves(moved["params"]))
    assert all(leaf > 0 for leaf in jax.tree.leaves(moved["router_state"]))


def test_counts_and_statistics_are_those_of_real_tokens(exact):
    metrics = exact["two"][1]
    counts = {name: count for name, (_, count) in metrics["terms"].items()}
    assert counts["lm"] == counts["head_z"] == NUM_TARGETS
    for name in ("balance_sequence", "balance_global", "balance_lagged", "router_z"):
        assert counts[name] == 2 * NUM_TOKENS  # two layers
    stats = metrics["stats"]["layers_0"]
    np.testing.assert_array_equal(stats["tokens"], [NUM_TOKENS] * 2)
    np.testing.assert_array_equal(stats["load"].sum(-1), [2 * NUM_TOKENS] * 2)
    np.testing.assert_array_equal(stats["dropped"], [0, 0])


def test_the_loss_is_the_weighted_sum_of_the_means(exact):
    metrics = exact["whole"][1]
    means = {name: total / count for name, (total, count) in metrics["terms"].items()}
    weights = NextToken(z_weight=0.01).weights(model_with())
    assert weights.keys() == means.keys()
    expected = sum(weights[name] * means[name] for name in weights)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", ["poisoned", "other_pad"])
def test_what_padding_holds_changes_nothing(exact, case):
    """`poisoned`: the padding's token has a NaN embedding row."""
    reference = exact["whole"][1]
    metrics = exact[case][1]
    if case == "poisoned":
        assert np.isfinite(metrics["loss"])
        assert np.isfinite(metrics["grad_norm"])
        assert metrics["accepted"]
        params = exact[case][0]["params"]
        nan_rows = np.isnan(params["embed"]["embedding"]).all(axis=1)
        np.testing.assert_array_equal(nan_rows, np.arange(VOCAB) == VOCAB - 1)
        others = jax.tree.leaves({k: v for k, v in params.items() if k != "embed"})
        assert all(np.isfinite(leaf).all() for leaf in others)
    else:
        for name in ("loss", "terms", "measures", "stats", "grad_norm"):
            assert_close(reference[name], metrics[name])


def test_two_pass_shares_are_the_whole_batchs_shares(exact):
    """balance_global from statistics: E * sum_e share_e * mean probability_e needs both halves."""
    terms = exact["two"][1]["terms"]
    assert terms["balance_global"][0] != terms["balance_sequence"][0]
    assert terms["balance_global"][0] > 0


def test_per_shard_balance_is_declared_dependent_on_microbatches():
    model = model_with((ShardLoadBalance(weight=1.0),))
    variables = random_model_variables(model)
    objective = NextToken()
    run = quick_jit(lambda b: objective(model, variables, b, token_bytes=TOKEN_BYTES).terms)
    batch = make_batch()
    halves = [jax.tree.map(lambda a, i=i: a[i::2], batch) for i in range(2)]
    whole = run(batch)["balance_shard"]
    parts = [run(half)["balance_shard"] for half in halves]
    assert whole[1] == parts[0][1] + parts[1][1]
    assert abs(whole[0] - parts[0][0] - parts[1][0]) > 1e-3
    assert ShardLoadBalance.mesh_dependent


def test_every_auxiliary_term_has_a_gradient():
    model = model_with(RULES[:2] + RULES[2:4])
    variables = random_model_variables(model)
    share = {"previous_share": jnp.tile(jnp.array([0.7, 0.1, 0.1, 0.1]), (2, 1))}
    state = {"layers_0": {"ffn": {f"balance_2_{k}": v for k, v in share.items()}}}
    objective = NextToken(z_weight=0.01)
    names = sorted(objective.weights(model))

    def losses(params):
        variables = {"params": params, "router_state": state}
        terms = objective(model, variables, make_batch(), token_bytes=TOKEN_BYTES).terms
        return jnp.stack([terms[name][0] / terms[name][1] for name in names])

    gradients = quick_jit(jax.jacrev(losses))(variables["params"])
    router = np.abs(gradients["layers_0"]["ffn"]["router"]["kernel"])
    largest = dict(zip(names, router.reshape(len(names), -1).max(axis=1), strict=True))
    head_z = np.abs(gradients["head"]["kernel"]).reshape(len(names), -1).max(axis=1)
    assert head_z[names.index("head_z")] > 0
    assert all(value > 0 for value in largest.values()), largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaNGradient(NextToken):
    """A finite loss whose gradient is NaN: sqrt has an infinite slope at 0."""

    def __call__(self, model, variables, batch, **options):
        result = super().__call__(model, variables, batch, **options)
        total, count = result.terms["lm"]
        return dataclasses.replace(
            result, terms=result.terms | {"lm": (total + jnp.sqrt(0 * total), count)}
        )


def test_a_nan_gradient_freezes_everything_but_the_step():
    model = model_with((LossFreeBias(rate=0.01),), num_layers=1)
    optimizer = optax.adam(1e-2)
    state = make_state(model, optimizer)
    before = jax.device_get(_numeric(state))
    new, metrics = quick_jit(make_step(model, optimizer, objective=NaNGradient()))(
        state, make_batch()
    )
    assert np.isfinite(metrics["loss"])
    assert np.isnan(metrics["grad_norm"])
    assert not metrics["accepted"]
    assert metrics["skipped"] == 1
    assert new.step == before.pop("step") + 1
    for name, value in before.items():
        jax.tree.map(np.testing.assert_array_equal, value, getattr(new, name))
    assert new.guard.num_nonfinite == 1
    assert new.guard.num_accepted == 0


def test_the_step_donates_its_state_and_trains():
    model, optimizer = dense(), optax.adam(3e-2)
    state = make_state(model, optimizer)
    step = quick_jit(make_step(model, optimizer), donate_argnums=0)
    first = state.params["head"]["kernel"]
    losses = []
    for _ in range(8):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["loss"]))
    assert first.is_deleted()
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 8


def test_bf16_parameters_accumulate_their_gradients_in_float32():
    model = dataclasses.replace(dense(), param_dtype="bfloat16")
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: init_state(model, optimizer, GUARD, 0))
    step = make_step(model, optimizer, num_microbatches=2)
    jaxpr = jax.make_jaxpr(step)(state, make_batch())
    carries = [
        {str(v.aval.dtype) for v in e.outvars[: e.params["num_carry"]]}
        for e in jaxpr.jaxpr.eqns
        if e.primitive.name == "scan" and e.params["num_carry"] > 1
    ]
    assert carries
    assert all("bfloat16" not in dtypes for dtypes in carries)
    assert jax.eval_shape(step, state, make_batch())[0].params == state.params


def test_the_first_pass_costs_nothing_where_only_counts_are_needed():
    """Counts depend on masks alone, so the compiled first pass has no matrix product left."""
    model = model_with((RouterZLoss(weight=0.1),))
    shapes = jax.eval_shape(lambda: init_state(model, optax.sgd(0.1), GUARD, 0))
    objective = NextToken()

    def forward(params, state, batch, key, loads):
        variables = {"params": params}
        return objective(model, variables, batch, token_bytes=TOKEN_BYTES, key=key, loads=loads)

    def counts(state, batch):
        parts = jax.tree.map(lambda x: x.reshape(2, 2, -1), batch)
        keys = jax.random.split(jax.random.key(0), 2)
        return _first_pass(model, forward, state, parts, keys)

    text = quick_jit(counts).lower(shapes, make_batch()).compile().as_text()
    assert " dot(" not in text
    assert "custom-call" not in text


def test_init_state_is_a_function_of_the_seed():
    model, optimizer = dense(), optax.adam(1e-3)
    draw = quick_jit(lambda seed: init_state(model, optimizer, GUARD, seed).params["head"])
    same = np.array_equal(draw(1)["kernel"], draw(1)["kernel"])
    assert same
    assert not np.array_equal(draw(1)["kernel"], draw(2)["kernel"])
