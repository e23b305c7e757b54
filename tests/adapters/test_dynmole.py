"""DynMoLE against the golden numbers of its authors' code and against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.adapters.dynmole import EntropySwitch, tsallis_entropy
from moejax.errors import UserError
from moejax.layers.reports import REPORTS
from moejax.verification.contracts.cases import make_context, quick_jit


def mixture_of(probs, mask=None, **settings):
    """The router's answer for tokens with these probabilities `[B, S, E]`."""
    probs = np.asarray(probs, np.float32)
    mask = np.ones(probs.shape[:2], bool) if mask is None else mask
    router = EntropySwitch(num_adapters=probs.shape[-1], **settings)
    variables = {"lora": {"gate": {"kernel": jnp.eye(probs.shape[-1])}}}
    run = lambda v, x: router.apply(v, x, make_context(mask), mutable=[REPORTS])[0]
    return quick_jit(run)(variables, jnp.log(probs))


def entropy(probs, q=1.1):
    return float(tsallis_entropy(jnp.asarray(probs)[None, None], q)[0, 0])


def test_entropy_is_that_of_the_authors_code():
    assert entropy(np.full(6, 1 / 6)) == pytest.approx(0.99966, abs=1e-5)
    assert entropy(np.eye(6)[0]) == pytest.approx(-1.6e-4, abs=1e-5)
    assert entropy([0.4, 0.3, 0.2, 0.1]) == pytest.approx(0.9220, abs=4e-4)
    assert entropy([0.7, 0.2, 0.05, 0.05]) == pytest.approx(0.6191, abs=4e-4)
    assert entropy([0.6, 0.14, 0.1, 0.1, 0.06]) == pytest.approx(0.7448, abs=4e-4)


@pytest.mark.parametrize(
    "probs, weights",
    [
        ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),  # undecided: all
        ([0.05, 0.7, 0.2, 0.05], [0, 0.7, 0.2, 0]),  # 0.9 > top_p, but two in any case
        ([0.6, 0.14, 0.1, 0.1, 0.06], [0.6, 0.14, 0, 0, 0]),  # up to 0.74, not divided by it
        ([0.3, 0.02, 0.36, 0.3, 0.02], [0.3, 0, 0.36, 0, 0]),
    ],
)
def test_who_is_chosen(probs, weights):
    found = mixture_of([[probs]]).weights[0, 0]
    np.testing.assert_allclose(found, weights, atol=1e-6)


def test_a_threshold_of_one_never_chooses_all():
    found = mixture_of([[[0.26, 0.25, 0.25, 0.24]]], threshold=1.0).weights[0, 0]
    np.testing.assert_allclose(found, [0.26, 0.25, 0, 0], atol=1e-6)


def test_losses_are_those_of_the_formulas_and_padding_counts_nowhere():
    probs = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3))
    mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
    mixture = mixture_of(probs, mask)
    weights = np.asarray(mixture.weights)
    total, count = mixture.terms["adapter_entropy"]
    assert count == 5
    expected = sum(entropy(p) for p in probs[mask])
    assert float(total) == pytest.approx(expected, rel=1e-5)
    total, count = mixture.terms["adapter_balance"]
    expected = sum(
        n * 4 * (weights[row, :n].mean(0) * probs[row, :n].mean(0)).sum()
        for row, n in ((0, 3), (1, 2))
    )
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert count == 5
    probs[1, 2] = [0.97, 0.01, 0.01, 0.01]
    for name, term in mixture_of(probs, mask).terms.items():
        np.testing.assert_allclose(term, mixture.terms[name], rtol=1e-6)


def test_equal_probabilities_are_a_stationary_point_of_both_losses():
    router = EntropySwitch(num_adapters=4)
    context = make_context(np.ones((1, 2), bool))

    def losses(x):
        variables = {"lora": {"gate": {"kernel": jnp.eye(4)}}}
        return [t[0] for t in router.apply(variables, x, context).terms.values()]

    for gradient in quick_jit(jax.jacrev(losses))(jnp.zeros((1, 2, 4))):
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_bad_settings_say_so():
    with pytest.raises(UserError, match="router.q=1 must be positive and not 1"):
        mixture_of([[[0.5, 0.5]]], q=1)
    with pytest.raises(UserError, match="router.k=3 must be between 1"):
        mixture_of([[[0.5, 0.5]]], k=3)
