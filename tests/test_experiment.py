"""What an experiment finds out about itself before there are data."""

import fiddle as fdl
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
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
