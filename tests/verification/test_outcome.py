"""One step of the model as it is, recorded, and with the choices of another run."""

import dataclasses

import numpy as np
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.models.expert_axes import expert_axes
from moejax.models.transformer import Transformer
from moejax.transport.all_to_all import AllToAll
from moejax.transport.local import Local
from moejax.verification import flips
from moejax.verification.compare import compare
from moejax.verification.outcome import outcome
from moejax.verification.variants import on_mesh, with_ffn
from moejax.verification.verify import FLOORS, TOLERANCES, make_batch, zero_gradients


@pytest.fixture(scope="module")
def experiment():
    config = load_config("configs/tiny.py:smoke")
    config.model.num_layers = 1
    config.model.dtype = "bfloat16"
    return build_config(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refuses(Transformer):
    """A model with a field of its own, which cannot be applied."""

    why: str

    def apply(self, *args, **options):
        raise NotImplementedError(self.why)


def test_a_model_of_the_users_own_class_stays_what_it_is(experiment):
    model = experiment.build_model(64)
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    with pytest.raises(NotImplementedError, match="not yet"):
        outcome(on_mesh(experiment, {}), Refuses(**given, why="not yet"), make_batch(2))


def random_choices(batch, num_experts, k):
    """`[1, T, K]`; padding chooses nothing."""
    rng = np.random.default_rng(3)
    chosen = np.stack([rng.permutation(num_experts)[:k] for _ in range(batch.tokens.size)])
    return np.where(batch.segment_ids.reshape(-1, 1) > 0, chosen, num_experts)[None]


@pytest.mark.long
def test_in_bfloat16_a_mesh_equals_one_device_that_replays_the_same_choices(experiment):
    batch, model = make_batch(8), experiment.build_model(64)
    choices = {"layers_0": random_choices(batch, model.moe.num_experts, k=2)}
    recorded = with_ffn(model, transport=Local())
    sent = with_ffn(model, transport=AllToAll())
    split = on_mesh(experiment, {"expert": 2})

    expected, made = outcome(on_mesh(experiment, {}), recorded, batch, replay=choices)
    found, _ = outcome(split, sent, batch, replay=choices)

    np.testing.assert_array_equal(made.choices["layers_0"], choices["layers_0"])
    best = np.argsort(-made.probs["layers_0"], axis=-1)[..., :2]
    best = {"layers_0": np.where(choices["layers_0"] < model.moe.num_experts, best, 4)}
    assert flips.share(choices, best, 4) > 0.3
    assert flips.margin(choices, best, made.probs) > 0
    differences = compare(found, expected, expert_axes(model), floor=FLOORS["bfloat16"])
    assert max(d.error for d in differences) < TOLERANCES["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["configs/lora.py:smoke", "configs/mixture_of_lora.py:smoke"])
def test_no_factor_of_an_adapter_goes_without_a_gradient(path):
    """A fresh one does: its other factor is zero, and what is wrong with it would not show."""
    config = load_config(path)
    config.model.num_layers = 1
    adapted = build_config(config)
    found, _ = outcome(on_mesh(adapted, {}), adapted.build_model(64), make_batch(2))
    assert any(name.startswith("gradient lora/") for name in found)
    assert not zero_gradients(found)
