"""Configs as text, and their differences."""

import fiddle as fdl
import jax.numpy as jnp
import pytest
import toy_experiment as toy

from moejax.config.overrides import apply_overrides
from moejax.config.text import config_diff, config_text

EXPECTED = """\
. = toy_experiment:Run
steps = 100
block = toy_experiment:Block
block.ffn = toy_experiment:FFN
block.ffn.num_experts = 8
block.ffn.router = toy_experiment:Top
block.ffn.router.k = 2
block.ffn.router.temperature = 1.0
block.ffn.router.normalise = True
block.ffn.activation = jax.nn:silu
block.ffn.init = jax.nn.initializers:normal
block.ffn.init.stddev = 0.02
block.ffn.init.dtype = None
block.ffn.dtype = float32
block.remat = 'none'
block.window = None
data = toy_experiment:Data
data.sources = tuple of 2
data.sources.0 = toy_experiment:Text
data.sources.0.path = 'a'
data.sources.0.weight = 1.0
data.sources.1 = toy_experiment:Text
data.sources.1.path = 'b'
data.sources.1.weight = 0.5
data.mixture = {'en': 0.7, 'de.at': 0.3}
data.tokenizer = None
data.betas = (0.9, 0.95)
data.names = ()
data.sizes = []
workdir = 'runs/toy'
note = None
extra = None
"""


def test_every_path_with_its_value_in_tree_order():
    assert config_text(toy.config.as_buildable()) == EXPECTED


def test_setting_a_default_explicitly_changes_nothing():
    config = toy.config.as_buildable()
    config.block.ffn.router.temperature = 1.0
    config.workdir = "runs/toy"
    assert config_text(config) == EXPECTED


def test_a_required_value_that_is_missing_shows():
    config = toy.config.as_buildable()
    del config.steps
    assert "\nsteps = (required, not set)\n" in config_text(config)


@pytest.mark.parametrize(
    "value, text",
    [
        (jnp.bfloat16, "bfloat16"),
        (jnp.dtype("bfloat16"), "bfloat16"),
        ((1,), "(1,)"),
        ([jnp.int32, None], "[int32, None]"),
        (1e-05, "1e-05"),
        ("two\nlines", r"'two\nlines'"),
        (toy.Top, "toy_experiment:Top"),
        (fdl.Partial(jnp.sum, axis=1), "partial jax.numpy:sum"),
    ],
)
def test_values(value, text):
    config = toy.config.as_buildable()
    config.note = value
    lines = dict(line.split(" = ", 1) for line in config_text(config).splitlines())
    assert lines["note"] == text


def test_diff_names_each_path_that_differs():
    a = toy.config.as_buildable()
    b = apply_overrides(
        a, ["steps=5", "block.ffn.router=toy_experiment:Expert"], note=lambda text: None
    )
    assert config_diff(a, a) == ""
    assert config_diff(a, b) == (
        "steps: 100 -> 5\n"
        "block.ffn.router: toy_experiment:Top -> toy_experiment:Expert\n"
        "block.ffn.router.k: 2 -> (none)\n"
        "block.ffn.router.temperature: 1.0 -> 3.0\n"
        "block.ffn.router.normalise: True -> (none)\n"
        "block.ffn.router.capacity: (none) -> 1.25\n"
    )


def test_a_field_that_the_owner_of_a_prototype_sets_is_not_shown():
    config = apply_overrides(toy.config.as_buildable(), ["extra=toy_experiment:Projects"])
    shown = [line for line in config_text(config).splitlines() if line.startswith("extra.")]
    assert shown == [
        "extra.projection = toy_experiment:Projection",
        "extra.projection.scale = 1.0",
    ]
