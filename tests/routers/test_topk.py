"""Top-k routing against transformers' routers (golden file) and the published formulas."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.routers.topk import TopK
from moejax.verification.contracts.cases import make_context, quick_jit

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "routers.npz")
GRID = 4096  # the golden file stores multiples of 1/4096
ROUTERS = {
    "mixtral": TopK(k=3),
    "olmoe": TopK(k=3, normalise="before"),
    "qwen3_moe": TopK(k=3),
    "deepseek_v2": TopK(
        k=3, normalise="before", scale=16.0, num_groups=4, num_groups_kept=2, group_score="max"
    ),
    "deepseek_v3": TopK(
        k=3, score="sigmoid", scale=2.5, num_groups=4, num_groups_kept=2, group_score="top2"
    ),
    "gpt_oss": TopK(k=3, use_bias=True),
}


def route(router, x, kernel, *, bias=None, selection_bias=None):
    params = {"kernel": jnp.asarray(kernel)} | ({} if bias is None else {"bias": jnp.asarray(bias)})
    context = make_context(
        np.ones((1, x.shape[0]), bool),
        num_experts=kernel.shape[1],
        selection_bias=None if selection_bias is None else jnp.asarray(selection_bias),
    )
    return quick_jit(lambda p, x, c: router.apply(p, x, c)[0])({"params": params}, x, context)


def from_logits(router, logits, **options):
    """Routing of one token whose logits are these."""
    return route(router, np.eye(1), np.asarray(logits)[None], **options)


def dense(routing):
    weights = np.zeros(routing.probs.shape, routing.weights.dtype)
    np.put_along_axis(weights, np.asarray(routing.experts), np.asarray(routing.weights), axis=1)
    return weights


def test_every_golden_is_used():
    assert {key.split("/")[0] for key in GOLDEN.files} == ROUTERS.keys()


@pytest.mark.parametrize("name", ROUTERS)
def test_selection_and_weights_equal_transformers(name):
    read = lambda key: (
        GOLDEN[f"{name}/{key}"] / np.float32(GRID) if f"{name}/{key}" in GOLDEN.files else None
    )
    routing = route(
        ROUTERS[name],
        read("x"),
        read("kernel"),
        bias=read("bias"),
        selection_bias=read("correction"),
    )
    expected = GOLDEN[f"{name}/dense"]
    np.testing.assert_array_equal(dense(routing) > 0, expected > 0)
    np.testing.assert_allclose(dense(routing), expected, rtol=2e-6)


def test_deepseek_v3_worked_example():
    """Group scores 1.612, .769, 3.021, 1.124 of biased scores: groups 2 and 0, experts 4 and 5."""
    router = TopK(k=2, score="sigmoid", scale=2.5, num_groups=4, num_groups_kept=2)
    bias = np.zeros(8)
    bias[4:6] = 0.9
    with jax.enable_x64(True):
        logits = np.array([2, 1, 0, -1, 0.5, 0.4, 0.3, 0.2])
        routing = from_logits(router, logits, selection_bias=bias)
        np.testing.assert_array_equal(routing.experts, [[4, 5]])
        np.testing.assert_allclose(routing.weights, [[1.27433334, 1.22566666]], atol=5e-9)


def test_top2_and_max_group_scores_differ():
    logits = np.log([0.4, 0.01, 0.2, 0.25, 0.1, 0.04])  # best pair: group 1; best single: group 0
    kept = {
        score: from_logits(
            TopK(k=1, num_groups=3, num_groups_kept=1, group_score=score), logits
        ).experts[0, 0]
        for score in ("max", "top2")
    }
    assert kept == {"max": 0, "top2": 3}


def test_a_group_of_negative_adjusted_scores_still_beats_a_dropped_group():
    """Dropped groups are at minus infinity: with 0 there, a biased-down kept expert would lose."""
    router = TopK(k=2, score="sigmoid", num_groups=2, num_groups_kept=1)
    bias = np.array([-3.0, -3.0, -5.0, -5.0], np.float32)
    routing = from_logits(router, np.zeros(4, np.float32), selection_bias=bias)
    np.testing.assert_array_equal(np.sort(routing.experts[0]), [0, 1])


def test_softmax_topk_renormalised_is_topk_then_softmax():
    logits = np.random.default_rng(0).standard_normal((50, 16))
    with jax.enable_x64(True):
        routing = route(TopK(k=4), np.eye(50), logits)
        best, experts = jax.lax.top_k(jnp.asarray(logits), 4)
        np.testing.assert_array_equal(routing.experts, experts)
        np.testing.assert_allclose(routing.weights, jax.nn.softmax(best), rtol=1e-13)


def test_selection_bias_selects_but_never_weighs_and_has_no_gradient():
    logits = np.array([[1.0, 0.5, 0.0, -1.0]], np.float32)
    bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    routing = route(TopK(k=2, normalise="before"), np.eye(1, dtype=np.float32), logits)
    biased = lambda bias: from_logits(TopK(k=2, normalise="before"), logits[0], selection_bias=bias)
    np.testing.assert_array_equal(biased(bias).experts, [[3, 0]])
    np.testing.assert_allclose(biased(bias).weights[0, 1], routing.weights[0, 0], rtol=1e-6)
    np.testing.assert_allclose(biased(bias).weights[0, 0], routing.probs[0, 3], rtol=1e-6)

    def total(bias):
        context = make_context([[True]], num_experts=4, selection_bias=bias)
        variables = {"params": {"kernel": jnp.asarray(logits)}}
        return TopK(k=2).apply(variables, jnp.ones((1, 1)), context)[0].weights[0, 0]

    np.testing.assert_array_equal(quick_jit(jax.grad(total))(bias), 0)


def test_ties_go_to_the_lower_expert():
    np.testing.assert_array_equal(from_logits(TopK(k=3), np.zeros(8)).experts, [[0, 1, 2]])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_logits_decide_where_scores_round_alike(score):
    """Sigmoids saturate upwards, and softmaxes vanish."""
    logits = np.array([20, 22, 21, 140, 24, 23] if score == "sigmoid" else [0, 2, 1, 140, 4, 3])
    routing = from_logits(TopK(k=4, score=score), np.float32(logits))
    scores = np.unique(np.delete(routing.probs[0], 3))
    assert len(scores) == 1
    np.testing.assert_array_equal(routing.experts, [[3, 4, 5, 1]])


def test_sigmoid_probabilities_sum_to_one_for_the_balance_loss():
    routing = from_logits(TopK(k=2, score="sigmoid"), np.array([3.0, -2.0, 0.5]))
    scores = 1 / (1 + np.exp(-np.array([3.0, -2.0, 0.5])))
    np.testing.assert_allclose(routing.probs[0], scores / scores.sum(), rtol=1e-6)


def test_scores_that_all_underflow_give_zero_weights_not_nan():
    routing = from_logits(TopK(k=2, score="sigmoid"), np.full(4, -200.0, np.float32))
    np.testing.assert_array_equal(routing.weights, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"k": 9}, r"router.k=9 must be between 1 and num_experts=8"),
        ({"k": 0}, r"router.k=0 must be between 1"),
        ({"k": 1, "num_groups": 3}, "num_groups=3 does not divide num_experts=8"),
        ({"k": 5, "num_groups": 4, "num_groups_kept": 2}, "leaves 4 experts for router.k=5"),
        ({"k": 1, "num_groups": 4, "num_groups_kept": 5}, "must be between 1 and"),
        ({"k": 1, "num_groups_kept": 2}, "must be between 1 and router.num_groups=1"),
        ({"k": 1, "num_groups": 8}, "use 'max'"),
        ({"k": 1, "score": "Softmax"}, "router.score='Softmax' must be one of softmax, sigmoid"),
        ({"k": 1, "normalise": "never"}, "must be one of before, after"),
        ({"k": 1, "group_score": "sum"}, "must be one of max, top2"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, message):
    with pytest.raises(UserError, match=message):
        from_logits(TopK(**options), np.zeros(8))
