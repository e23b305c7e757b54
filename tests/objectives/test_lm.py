"""Next-token loss against numpy, on logits that are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models.output import Output
from moejax.models.transformer import Transformer
from moejax.objectives.lm import NextToken
from moejax.types import Batch, mean
from moejax.verification.contracts.cases import quick_jit

MASK = np.array([[True, True, False], [True, False, False]])
TARGETS = np.array([[2, 0, 9], [1, 1, 1]])
LOGITS = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
TOKEN_BYTES = np.array([1, 2, 3, 5])


class FixedModel(Transformer):
    """Answers with `variables`."""

    def __init__(self):
        pass

    def apply(self, variables, tokens, **kwargs):
        terms = {"aux": (jnp.ones(()), jnp.ones(()))}
        return Output(logits=variables, terms=terms, stats={}, cache={})

    def loss_weights(self):
        return {"aux": 0.5}


def run(objective, logits=LOGITS, mask=MASK, targets=TARGETS):
    batch = Batch(
        tokens=np.zeros_like(TARGETS),
        targets=targets,
        loss_mask=mask,
        segment_ids=np.ones_like(TARGETS),
        positions=np.zeros_like(TARGETS),
    )
    call = lambda z, batch: objective(FixedModel(), z, batch, token_bytes=TOKEN_BYTES)
    return quick_jit(call)(logits, batch)


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_mean_negative_log_likelihood_over_masked_targets():
    terms = run(NextToken()).terms
    losses = [-log_softmax(LOGITS[b, s])[TARGETS[b, s]] for b, s in ((0, 0), (0, 1), (1, 0))]
    assert terms["lm"][1] == 3
    assert mean(terms["lm"]) == pytest.approx(np.mean(losses), rel=1e-6)
    assert "head_z" not in terms
    assert "aux" in terms


def test_bits_per_byte_counts_the_bytes_of_the_targets():
    result = run(NextToken())
    total, num_bytes = result.measures["bits_per_byte"]
    assert num_bytes == 3 + 1 + 2
    assert float(total) == pytest.approx(float(result.terms["lm"][0]) / np.log(2), rel=1e-6)


def test_z_term_and_weights():
    objective = NextToken(z_weight=0.1)
    total, count = run(objective).terms["head_z"]
    z = np.log(np.exp(LOGITS).sum(-1))[MASK]
    assert count == 3
    assert total == pytest.approx(np.square(z).sum(), rel=1e-6)
    assert objective.weights(FixedModel()) == {"lm": 1.0, "head_z": 0.1, "aux": 0.5}
    assert NextToken().weights(FixedModel()) == {"lm": 1.0, "aux": 0.5}


def test_what_is_masked_changes_nothing_nan_included():
    junk = np.where(MASK[..., None], LOGITS, np.nan)
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, run(NextToken(z_weight=1.0)), run(NextToken(z_weight=1.0), junk))


def test_a_target_outside_the_vocabulary_is_nan_where_it_counts():
    """Row 0's third target is 9 of 4: masked above, so harmless; unmasked, it must show."""
    assert np.isfinite(run(NextToken()).terms["lm"][0])
    assert np.isnan(run(NextToken(), mask=np.ones_like(MASK)).terms["lm"][0])


@pytest.mark.parametrize("unknown", [-1, -4, -100, 4])
def test_no_unknown_target_is_taken_for_another_token(unknown):
    """Of -1 to -4 indexing would count from the end; -100 is what other tools mask with."""
    targets = TARGETS.copy()
    targets[0, 2] = unknown
    assert np.isfinite(run(NextToken(), targets=targets).terms["lm"][0])
    every = np.ones_like(MASK)
    result = run(NextToken(), mask=every, targets=targets)
    assert np.isnan(result.terms["lm"][0])
    assert result.measures["bits_per_byte"][1] == 3 + 1 + 2 + 2 + 2
