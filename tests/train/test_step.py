"""One optimiser step: exact under accumulation, frozen by a bad gradient, blind to padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.balance.load_balance import (
    TwoPassLoadBalance,
)
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.unbalanced import Unbalanced
from moejax.balance.z_loss import RouterZLoss
from moejax.objectives.lm import NextToken
from moejax.routers.sparsemixer import SparseMixer
from moejax.train.state import init_state
from moejax.train.step import _first_pass, jit_step
from moejax.verification.contracts.cases import quick_jit, to_dtype
from tests.models.tiny_model import (
    VOCAB,
    as_float64,
    dense,
    moe,
    random_model_variables,
)
from tests.train.step_cases import (
    GUARD,
    NUM_TARGETS,
    NUM_TOKENS,
    RULES,
    TOKEN_BYTES,
    make_batch,
    make_state,
    make_step,
    model_with,
    numeric,
    with_nan_pad_embedding,
    with_pad_token,
)


@pytest.fixture(scope="module")
def exact():
    """{case: (state, metrics)} of one SGD step in float64: whole, and in two parts with remat."""
    optimizer = optax.sgd(0.1)
    with jax.enable_x64(True):
        model = as_float64(model_with())
        cases = {
            "whole": make_step(model, optimizer),
            "two": make_step(
                dataclasses.replace(model, remat="full"), optimizer, num_microbatches=2
            ),
        }
        state = to_dtype(make_state(model, optimizer), jnp.float64)
        run = {name: quick_jit(step) for name, step in cases.items()}
        out = {name: step(state, make_batch()) for name, step in run.items()}
        poisoned = with_nan_pad_embedding(state, VOCAB - 1)
        out["poisoned"] = run["whole"](poisoned, with_pad_token(VOCAB - 1))
        out["other_pad"] = run["whole"](state, make_batch(pad_token=3))
        return jax.device_get({k: (numeric(s), m) for k, (s, m) in out.items()}) | {
            "before": jax.device_get(numeric(state))
        }


def assert_close(a, b, tolerance=1e-12):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, a, b)


@pytest.mark.slow
def test_accumulation_and_remat_change_nothing(exact):
    """Every sum, count, statistic, the loss, the gradient (by an SGD step) and router state."""
    (state, metrics), (other_state, other) = exact["whole"], exact["two"]
    for name in ("loss", "terms", "measures", "stats", "grad_norm", "update_norm"):
        assert_close(metrics[name], other[name])
    assert_close(state, other_state)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state, exact["before"])
    assert all(leaf > 0 for leaf in jax.tree.leaves(moved["params"]))
    assert all(leaf > 0 for leaf in jax.tree.leaves(moved["router_state"]))


def test_microbatches_do_not_change_what_is_drawn():
    """A router that samples draws the same for every sequence, whichever part it is in."""
    sampling = moe(router=SparseMixer(jitter=2.0), shared=None, balance=(Unbalanced(),))
    model = dense(ffn=sampling, param_dtype="float64", dtype="float64")
    optimizer = optax.sgd(0.1)
    with jax.enable_x64(True):
        state = to_dtype(make_state(model, optimizer), jnp.float64)
        after, other_key = {}, dataclasses.replace(state, key=jax.random.key(1))
        for parts in (1, 2, 4):
            step = quick_jit(make_step(model, optimizer, num_microbatches=parts))
            after[parts] = jax.device_get(numeric(step(state, make_batch())[0]))
            after["other"] = jax.device_get(numeric(step(other_key, make_batch())[0]))
    assert_close(after[2], after[1])
    assert_close(after[4], after[1])
    differences = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), after[1]["params"], after["other"]["params"]
    )
    assert max(jax.tree.leaves(differences)) > 1e-3  # it does draw


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_nan_gradient_freezes_everything_but_the_step():
    model = model_with((LossFreeBias(rate=0.01),), num_layers=1)
    optimizer = optax.adam(1e-2)
    state = make_state(model, optimizer)
    before = jax.device_get(numeric(state))
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
    jaxpr = jax.make_jaxpr(step)(state, make_batch()).jaxpr
    head = state.params["head"]["kernel"].shape
    results = [v.aval for e in jaxpr.eqns if e.primitive.name == "scan" for v in e.outvars]
    assert {str(aval.dtype) for aval in results if aval.shape == head} == {"float32"}
    assert jax.eval_shape(step, state, make_batch())[0].params == state.params


def test_the_first_pass_costs_nothing_where_only_counts_are_needed():
    """Counts depend on masks alone, so the compiled first pass has no matrix product left."""

    def num_products(rule):
        model = model_with((rule,))
        shapes = jax.eval_shape(lambda: init_state(model, optax.sgd(0.1), GUARD, 0))

        def forward(params, state, batch, key, loads):
            objective = NextToken()
            variables = {"params": params}
            return objective(model, variables, batch, token_bytes=TOKEN_BYTES, loads=loads)

        def first_pass(state, batch):
            parts = jax.tree.map(lambda x: x.reshape(2, 2, -1), batch)
            keys = jax.random.split(jax.random.key(0), 2)
            return _first_pass(model, forward, state, parts, keys)

        text = quick_jit(first_pass).lower(shapes, make_batch()).compile().as_text()
        return text.count(" dot(")

    assert num_products(RouterZLoss(weight=0.1)) == 0
    assert num_products(TwoPassLoadBalance(weight=0.1)) > 0


def test_init_state_is_a_function_of_the_seed():
    model, optimizer = dense(), optax.adam(1e-3)
    draw = quick_jit(lambda seed: init_state(model, optimizer, GUARD, seed).params["head"])
    same = np.array_equal(draw(1)["kernel"], draw(1)["kernel"])
    assert same
    assert not np.array_equal(draw(1)["kernel"], draw(2)["kernel"])


def test_the_new_moments_are_never_stored_beside_the_old():
    """Until the guard has judged a step, only its updates wait in memory."""
    model, optimizer = dataclasses.replace(dense(), vocab_size=4096), optax.adam(1e-3)
    state = jax.eval_shape(lambda: init_state(model, optimizer, GUARD, 0))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    compiled = jit_step(make_step(model, optimizer)).lower(state, make_batch()).compile()
    # 2.5 times the parameters: gradient, updates, activations. 3.5 if the moments waited too.
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * size
