"""In the config's dtype the one device replays a variant's choices; in float64 it makes its own."""

import jax
import numpy as np
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.verification import verify as verification
from moejax.verification.outcome import Routed

OWN = np.array([[[0, 1], [2, 3], [4, 4]]])  # [L, T, K], padding last
OTHERS = np.array([[[1, 0], [2, 1], [4, 4]]])  # one of four real choices is another
PROBS = np.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.4, 0.3], [0, 0, 0, 0]]])


def outcome(experiment, model, batch, *, replay=None):
    """A model whose loss is the sum of its choices: on one device its own, else `OTHERS`."""
    alone = experiment.mesh.data == 1 and experiment.mesh.expert == 1
    choices = OWN if alone else OTHERS
    if replay is not None:
        assert alone
        choices = replay["layers_0"]
    found = {"loss": np.asarray(np.sum(choices * [1, 2]))}
    return found, Routed(choices={"layers_0": choices}, probs={"layers_0": PROBS} if alone else {})


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setattr(verification, "outcome", outcome)
    monkeypatch.setattr(verification, "by_definition", lambda found, *unused: found)
    config = load_config("configs/tiny.py:smoke")
    config.model.dtype = "bfloat16"
    with jax.enable_x64(True):
        found = verification.verify(
            build_config(config), chosen=lambda name: name in ("expert=8", "remat full")
        )
        return {(c.name, c.dtype): c for c in found}


def test_choices_are_replayed_in_the_configs_dtype_alone(checked):
    assert checked["expert=8", "float64"].wrong
    assert checked["expert=8", "float64"].flipped is None
    replayed = checked["expert=8", "bfloat16"]
    assert not replayed.wrong
    assert replayed.flipped == 0.25
    assert replayed.margin == pytest.approx(0.3 - 0.2)


def test_where_no_choice_flips_there_is_no_margin(checked):
    same = checked["remat full", "bfloat16"]
    assert not same.wrong
    assert (same.flipped, same.margin) == (0, None)
