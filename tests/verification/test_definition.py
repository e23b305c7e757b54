"""What verify works out for itself: an outcome's norm, loss, update and counts; and its batch."""

import numpy as np
import pytest

from moejax.verification.definition import by_definition
from moejax.verification.outcome import LEARNING_RATE
from moejax.verification.verify import VOCABULARY, make_batch, padded

BATCH = make_batch(8)
NUM_TOKENS = int((BATCH.segment_ids > 0).sum())
WEIGHTS = {"lm": 1.0, "router_z": 0.5}


def right_outcome():
    """Consistent in itself, for 2 layers with 4 experts and 2 choices per token."""
    rng = np.random.default_rng(1)
    initial, gradient = rng.normal(size=(2, 3, 5))
    choices = rng.integers(0, 4, (2, BATCH.tokens.size, 2))
    choices[:, BATCH.segment_ids.reshape(-1) == 0] = 4
    found = {
        "initial w": initial,
        "loss": 6.0 / BATCH.loss_mask.sum() + 0.5 * 8.0 / 7.0,
        "term lm/0": 6.0,
        "term lm/1": BATCH.loss_mask.sum(),
        "term router_z/0": 8.0,
        "term router_z/1": 7.0,
        "statistics layers_0/load": np.stack([np.bincount(c.ravel())[:4] for c in choices]),
        "statistics layers_0/tokens": np.array([NUM_TOKENS, NUM_TOKENS]),
        "global_norm of all gradients": np.linalg.norm(gradient),
        "gradient w": gradient,
        "updated w": initial - LEARNING_RATE * gradient,
    }
    return {name: np.asarray(value) for name, value in found.items()}, {"layers_0": choices}


def test_leaves_a_right_outcome_as_it_is():
    found, choices = right_outcome()
    defined = by_definition(found, choices, BATCH, WEIGHTS)
    assert list(defined) == list(found)
    for name, value in found.items():
        np.testing.assert_allclose(defined[name], value, rtol=1e-14, err_msg=name)


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "term lm/1",
        "statistics layers_0/load",
        "statistics layers_0/tokens",
        "global_norm of all gradients",
        "updated w",
    ],
)
def test_corrects_what_follows_from_the_rest(name):
    found, choices = right_outcome()
    wrong = found | {name: found[name] + 1}
    defined = by_definition(wrong, choices, BATCH, WEIGHTS)
    for key, value in found.items():
        np.testing.assert_allclose(defined[key], value, rtol=1e-14, err_msg=key)


def test_tokens_are_unevenly_spread_so_that_means_of_means_are_wrong():
    counts = BATCH.loss_mask.reshape(4, -1).sum(axis=1)
    assert len(set(counts)) > 2
    assert BATCH.loss_mask[::2].sum() != BATCH.loss_mask[1::2].sum()
    assert (BATCH.segment_ids[:2] > 0).all()


def test_padding_has_tokens_that_give_nan():
    longer = padded(BATCH, 8)
    assert (longer.tokens[:, 16:] >= VOCABULARY).all()
    assert not longer.segment_ids[:, 16:].any()
    assert not longer.loss_mask[:, 16:].any()
