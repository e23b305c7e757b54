"""SparseMixer against transformers (golden file), and what training draws."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.layers.row_keys import row_keys
from moejax.routers.sparsemixer import SparseMixer
from moejax.verification.contracts.cases import make_context, quick_jit

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "sparsemixer.npz")
LOGITS = GOLDEN["logits"] / np.float32(4096)
PROBE = GOLDEN["probe"] / np.float32(32)
KEY = jax.random.split(jax.random.key(3), 1)  # of one row


def context_of(num_tokens: int, num_experts: int, **changes):
    return make_context(np.ones((1, num_tokens), bool), num_experts=num_experts).replace(**changes)


def route(router, logits, **changes):
    """The routing of tokens with these logits, and the gradient of `weights * PROBE` by them."""
    context = context_of(*logits.shape, **changes)

    def run(kernel, context):
        routing = router.apply({"params": {"kernel": kernel}}, jnp.eye(len(logits)), context)[0]
        return jnp.sum(routing.weights * PROBE[: len(logits)]), routing

    gradient, routing = quick_jit(jax.grad(run, has_aux=True))(jnp.asarray(logits), context)
    return routing, gradient


def draw(logits, num_tokens, key):
    """The routing of so many tokens that have all the same logits, in training."""
    run = lambda kernel, x, c: SparseMixer(jitter=0.25).apply({"params": {"kernel": kernel}}, x, c)
    context = context_of(num_tokens, len(logits), key=key)
    return quick_jit(run)(jnp.asarray([logits]), jnp.ones((num_tokens, 1)), context)[0]


@pytest.mark.parametrize("name, jitter", [("published", 0.01), ("wide", 0.4)])
def test_choices_weights_and_gradients_equal_transformers(name, jitter):
    routing, gradient = route(SparseMixer(jitter=jitter), LOGITS)
    np.testing.assert_array_equal(routing.experts, GOLDEN[f"{name}/experts"])
    np.testing.assert_allclose(routing.weights, GOLDEN[f"{name}/weights"], rtol=2e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/gradient"], atol=2e-6)
    assert routing.extras == {}


def test_the_golden_widths_differ():
    """With the published one nearly every choice is alone; with the wide one few are."""
    alone = {n: (GOLDEN[f"{n}/weights"] > 0.999).mean() for n in ("published", "wide")}
    assert alone["published"] > 0.8 > 0.3 > alone["wide"]


def test_in_training_the_same_choices_have_transformers_gradients_and_steps():
    choices = jnp.asarray(GOLDEN["training/experts"], jnp.int32)
    router = SparseMixer(jitter=0.4)
    plain, _ = route(router, LOGITS, selection=choices)
    routing, gradient = route(router, LOGITS, selection=choices, key=KEY)
    np.testing.assert_array_equal(routing.experts, choices)
    np.testing.assert_allclose(gradient, GOLDEN["training/gradient"], atol=2e-6)
    assert (np.abs(gradient) > 1e-3).any()
    steps = np.asarray(routing.weights / plain.weights)
    theirs = GOLDEN["training/weights"] / plain.weights
    for found in (steps, theirs):
        np.testing.assert_allclose(np.where(found > 0.5, 1, 1 / 3), found, atol=2e-4)
    sure = np.asarray(plain.weights) >= _best(LOGITS, choices) - 1e-6
    for found in (steps, theirs):
        assert (found[sure] > 0.5).all()
        assert (found[~sure] < 0.5).any()
    np.testing.assert_allclose(routing.extras["log_prob"], np.log(plain.weights).sum(-1), rtol=1e-5)


def _best(logits, choices) -> np.ndarray:
    """The largest probability of each turn's softmax, by numpy."""
    out, left = [], np.float64(logits)
    for turn in range(2):
        best = left.max(-1, keepdims=True)
        near = (best - logits) / np.maximum(np.abs(logits), best) <= 0.8
        shares = np.where(near, np.exp(left), 0)
        out.append((shares / shares.sum(-1, keepdims=True)).max(-1))
        left = np.where(np.arange(8) == choices[:, turn : turn + 1], -np.inf, left)
    return np.stack(out, axis=-1)


def test_training_draws_from_the_two_softmaxes_and_steps_fully_in_one_case_of_four():
    """An expert that is not near the best is never drawn."""
    logits = [2.0, 1.5, 1.2, -3.0]
    routing = draw(logits, 8192, KEY)
    first, second = np.asarray(routing.experts).T
    shares = np.exp([2.0, 1.5, 1.2])
    shares /= shares.sum()
    counts = np.bincount(first, minlength=4) / len(first)
    np.testing.assert_allclose(counts, [*shares, 0], atol=0.02)
    after = second[first == 0]  # of 1.5 and 1.2
    expected = 1 / (1 + np.exp(-0.3))
    assert (after == 1).mean() == pytest.approx(expected, abs=0.03)
    weights = np.asarray(routing.weights)[:, 0]
    np.testing.assert_allclose(weights[first == 0], shares[0], rtol=1e-5)
    full = weights[first == 1] > shares[1] / 2
    assert full.mean() == pytest.approx(0.25, abs=0.04)
    np.testing.assert_allclose(weights[first == 1][~full], shares[1] / 3, rtol=1e-5)
    np.testing.assert_allclose(weights[first == 1][full], shares[1], rtol=1e-5)
    assert 3 not in second
    assert (draw(logits, 8192, row_keys(jax.random.key(4), 1)).experts != routing.experts).any()


def test_padding_behind_sequences_changes_no_draw():
    rows = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    router, found = SparseMixer(jitter=0.4), {}
    for length in (5, 7):
        mask = np.arange(length) < np.array([[5], [5]])
        x = np.zeros((2, length, 8), np.float32)
        x[:, :5] = rows
        context = make_context(mask, num_experts=8).replace(key=row_keys(jax.random.key(3), 2))
        run = quick_jit(lambda x, c: router.apply({"params": {"kernel": jnp.eye(8)}}, x, c)[0])
        routing = run(jnp.asarray(x.reshape(-1, 8)), context)
        found[length] = [
            np.asarray(a).reshape(2, length, -1)[:, :5]
            for a in (routing.experts, routing.weights, routing.extras["log_prob"])
        ]
    for short, long in zip(found[5], found[7], strict=True):
        np.testing.assert_array_equal(short, long)
    log_prob = np.asarray(routing.extras["log_prob"]).reshape(2, 7)
    assert (log_prob[:, :5] < 0).any()
    np.testing.assert_array_equal(log_prob[:, 5:], 0)


def test_evaluation_chooses_the_two_best_even_where_their_probabilities_round_alike():
    logits = np.float32([[0.1, np.nextafter(np.float32(0.1), np.float32(1)), 0.0]])
    routing, _ = route(SparseMixer(), logits)
    np.testing.assert_array_equal(routing.experts, [[1, 0]])


def test_the_best_may_be_zero_or_negative():
    logits = np.float32([[0.0, -1.0, -1.5], [-2.0, -1.0, -1.5], [-1.0, 0.0, 0.0]])
    routing, _ = route(SparseMixer(jitter=0.25), logits)
    np.testing.assert_array_equal(routing.experts, [[0, 1], [1, 2], [1, 2]])
    # (b - s) / max(|s|, b) is 1 for any s below b = 0; in row 1 it is 1/2 and 1/3.
    three = 1 / (1 + np.exp(-1.0) + np.exp(-0.5))
    np.testing.assert_allclose(routing.weights[:, 0], [1, three, 0.5], rtol=1e-6)
    two = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(routing.weights[:, 1], [two, two, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "router, changes, text",
    [
        (SparseMixer(jitter=-0.1), {}, "router.jitter=-0.1 must be at least 0"),
        (SparseMixer(), {"num_experts": 1}, "num_experts=1 are too few"),
        (SparseMixer(), {"selection_bias": jnp.zeros(3)}, "no place for a selection bias"),
    ],
)
def test_what_cannot_be_is_one_sentence(router, changes, text):
    context = context_of(2, 3).replace(**changes)
    with pytest.raises(UserError, match=text):
        router.init(jax.random.key(0), jnp.ones((2, 4)), context)
