"""The checks of a whole config, and building it."""

import copy
import dataclasses

import fiddle as fdl
import flax.linen as nn
import pytest
import toy_experiment as toy

from moejax.attention.full import FullAttention
from moejax.config import paths
from moejax.config.build import build_config
from moejax.config.check import check_config, duplicate_quantities
from moejax.errors import UserError
from moejax.layers.linear import Linear


@pytest.fixture
def config():
    return toy.config.as_buildable()


def error_of(config):
    with pytest.raises(UserError) as caught:
        check_config(config)
    return str(caught.value)


def test_a_right_config_passes_and_builds(config):
    assert check_config(config) is config
    assert build_config(config).data.sources[1].weight == 0.5


def test_one_component_at_two_paths(config):
    config.extra = config.block.ffn.router
    assert error_of(config) == (
        "block.ffn.router and extra are one and the same object, so that they would share their "
        "weights and settings: give each its own (copy.deepcopy of the config)"
    )
    config.extra = copy.deepcopy(config.extra)
    check_config(config)


def test_one_list_at_two_paths(config):
    config.data.sizes = config.note = [1, 2]
    assert "data.sizes and note are one and the same object" in error_of(config)


def test_what_lies_below_a_shared_component_is_not_named_again(config):
    config.extra = config.block
    assert len(error_of(config).splitlines()) == 1


def test_a_required_argument_without_a_value(config):
    del config.block.ffn.num_experts
    assert error_of(config) == (
        "block.ffn.num_experts has no value and toy_experiment:FFN needs one: set it"
    )


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("steps", "50", "steps takes int, not '50' (str)"),
        ("steps", True, "steps takes int, not True (bool)"),
        ("workdir", None, "workdir takes str, not None"),
        ("extra", toy.Top, "extra takes Module or None, not the class toy_experiment:Top: write"),
        ("extra", fdl.Config(toy.Text, path="a"), "not the component toy_experiment:Text"),
        ("block", toy.config, "block is the config function config itself: call it"),
    ],
)
def test_a_value_of_the_wrong_type(config, path, value, message):
    setattr(config, path, value)
    assert message in error_of(config)


def test_all_problems_are_named_at_once(config):
    config.steps = "x"
    config.block.window = 1.5
    assert [line.split()[0] for line in error_of(config).splitlines()] == ["steps", "block.window"]


def test_an_element_of_the_wrong_type(config):
    config.data.mixture["en"] = "most"
    message = error_of(config)
    assert "data.mixture takes dict[str, float]" in message
    assert "data.mixture.en takes float, not 'most' (str)" in message


def test_a_protocol_is_checked_by_its_members(config):
    config.block.ffn.router = fdl.Config(toy.NoRouter)
    assert "block.ffn.router takes Router, not the component toy_experiment:NoRouter" in error_of(
        config
    )


class _Shares(nn.Module):
    router: nn.Module = toy.Top()


def test_a_module_as_class_level_default(config):
    config.extra = fdl.Config(_Shares)
    assert "_Shares has a Top object as the default of 'router'" in error_of(config)


def test_a_field_that_the_owner_of_a_prototype_sets(config):
    config.extra = fdl.Config(toy.Projects, projection=fdl.Config(toy.Projection, scale=2.0))
    assert check_config(config) is config
    config.extra.projection.width = 7
    message = (
        "extra.projection.width has no effect: toy_experiment:Projects sets it in every copy that "
        "it makes of extra.projection; leave it out"
    )
    assert error_of(config) == message
    config.extra = fdl.Config(toy.Projects, projection=toy.Projection(width=7))
    assert error_of(paths.as_config(config)) == message
    config.extra, config.note = None, (fdl.Config(toy.Projection, width=7),)
    assert "note.0.width has no effect: toy_experiment:Run sets it" in error_of(config)


def test_the_projections_of_a_model_cannot_be_given_a_width():
    config = fdl.Config(FullAttention, num_heads=2, num_kv_heads=1, linear=fdl.Config(Linear))
    assert check_config(config) is config
    for name, value in (("features", 7), ("use_bias", True), ("axes", ("embed", "heads"))):
        config.linear = fdl.Config(Linear, **{name: value})
        assert f"linear.{name} has no effect: moejax.attention.full:FullAttention" in error_of(
            config
        )


def test_a_refused_value_names_its_component(config):
    @dataclasses.dataclass(frozen=True)
    class Picky:
        k: int

        def __post_init__(self):
            raise UserError(f"k={self.k} is too large")

    config.note = (fdl.Config(Picky, k=9),)
    with pytest.raises(UserError, match=r"^note\.0: k=9 is too large$"):
        build_config(config)
    config.note, config.steps = None, 0
    with pytest.raises(UserError, match=r"^steps=0 must be at least 1$"):
        build_config(config)


def test_a_quantity_with_one_owner_is_no_duplicate(config):
    assert duplicate_quantities(config) == {}


def test_a_quantity_with_two_owners(config):
    config.note = {"total_steps": 100, "num_experts": None}
    assert duplicate_quantities(config) == {"steps": ["steps", "note.total_steps"]}
    weights = {"weight": ("weight",)}
    assert duplicate_quantities(config, weights) == {
        "weight": ["data.sources.0.weight", "data.sources.1.weight"]
    }
