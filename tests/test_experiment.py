"""What an experiment finds out about itself before there are data."""

import contextlib

import fiddle as fdl
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.data.mixture import Mixture
from moejax.data.source import package_readmes, python_stdlib
from moejax.errors import UserError
from moejax.layers.mixing.granularity import Task


@pytest.mark.parametrize("prompts", [(), ("def ",)])
def test_prompts_that_a_router_by_task_cannot_continue_are_found_before_training(prompts):
    config = load_config("configs/mixture_of_lora.py:smoke")
    config.adapter.linear.router.granularity = fdl.Config(Task, num_tasks=2)
    sources = tuple(map(fdl.Config, (package_readmes, python_stdlib)))
    config.data.train = fdl.Config(Mixture, sources=sources, weights=(1.0, 1.0))
    config.prompts = prompts
    experiment = build_config(config)
    if not prompts:
        experiment.check()
        return
    with pytest.raises(UserError, match="task_ids"):
        experiment.check()


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["model.block.ffn.router.k=1"],
            "the model's router trains, but .*=before",
        ),
        (["model.block.ffn.router.k=1", "model.block.ffn.router.normalise=before"], None),
        (["model.block.ffn.router.k=1", 'trainable=["*/experts/*"]'], None),
    ],
)
def test_a_router_that_the_loss_cannot_reach_does_not_train(overrides, text):
    """A single weight that is divided by itself is 1, whatever the router says."""
    check(apply_overrides(load_config("configs/tiny.py:smoke"), overrides), text)


@pytest.mark.parametrize("k", [1, 2])
def test_a_mixtures_router_that_the_loss_cannot_reach_does_not_train(k):
    config = load_config("configs/mixture_of_lora.py:smoke")
    config.adapter.linear.router.k = k
    check(config, "the adapter.linear's router trains, but .*: set k=2 or more" if k == 1 else None)


def check(config, text):
    refused = pytest.raises(UserError, match=text) if text else contextlib.nullcontext()
    with refused:
        build_config(config).check()
