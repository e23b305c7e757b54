"""Overrides: typed values, suggestions for unknown paths, components swapped."""

import fiddle as fdl
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import toy_experiment as toy

from moejax.config import paths
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError


def overridden(*overrides, **kwargs):
    return apply_overrides(toy.config.as_buildable(), overrides, **kwargs)


def error_of(*overrides):
    with pytest.raises(UserError) as caught:
        overridden(*overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("steps=50", lambda c: c.steps, 50),
        ("steps=1_000", lambda c: c.steps, 1000),
        ("steps=1e6", lambda c: c.steps, 1_000_000),
        ("block.ffn.router.k=3", lambda c: c.block.ffn.router.k, 3),
        ("block.ffn.router.temperature=1e-3", lambda c: c.block.ffn.router.temperature, 1e-3),
        ("block.ffn.router.temperature=2", lambda c: c.block.ffn.router.temperature, 2.0),
        (
            "block.ffn.router.temperature=inf",
            lambda c: c.block.ffn.router.temperature,
            float("inf"),
        ),
        ("block.ffn.router.normalise=False", lambda c: c.block.ffn.router.normalise, False),
        ("block.ffn.router.normalise=false", lambda c: c.block.ffn.router.normalise, False),
        ("block.window=128", lambda c: c.block.window, 128),
        ("block.window=none", lambda c: c.block.window, None),
        ("block.window=None", lambda c: c.block.window, None),
        ("block.remat=full", lambda c: c.block.remat, "full"),
        ("block.remat=none", lambda c: c.block.remat, "none"),
        ("block.ffn.dtype=bfloat16", lambda c: c.block.ffn.dtype, jnp.bfloat16),
        ("block.ffn.activation=jax.nn:gelu", lambda c: c.block.ffn.activation, jax.nn.gelu),
        ("data.sources.1.weight=2", lambda c: c.data.sources[1].weight, 2.0),
        ("data.mixture.en=0.5", lambda c: c.data.mixture["en"], 0.5),
        ("data.mixture.de.at=0.5", lambda c: c.data.mixture["de.at"], 0.5),
        ("data.tokenizer=bytes", lambda c: c.data.tokenizer, "bytes"),
        ("data.tokenizer=none", lambda c: c.data.tokenizer, None),
        ("data.tokenizer=a.py:B", lambda c: c.data.tokenizer, "a.py:B"),
        ("data.betas=0.8,0.9", lambda c: c.data.betas, (0.8, 0.9)),
        ("data.betas=[0.8, 1]", lambda c: c.data.betas, (0.8, 1)),
        ("data.betas.0=0.5", lambda c: c.data.betas, (0.5, 0.95)),
        ("data.names=dense,moe", lambda c: c.data.names, ("dense", "moe")),
        ("data.names=('a',)", lambda c: c.data.names, ("a",)),
        ("data.sizes=1,2", lambda c: c.data.sizes, [1, 2]),
        ("data.sizes=(3,)", lambda c: c.data.sizes, [3]),
        ("workdir=123", lambda c: c.workdir, "123"),
        ("workdir=runs/a=b", lambda c: c.workdir, "runs/a=b"),
        ("workdir='a b'", lambda c: c.workdir, "a b"),
        ("note=3", lambda c: c.note, 3),
        ("note=word", lambda c: c.note, "word"),
    ],
)
def test_value_is_read_as_the_annotated_type(override, read, value):
    got = read(overridden(override))
    assert got == value
    assert type(got) is type(value)


def test_the_given_config_stays_as_it_was():
    before = toy.config.as_buildable()
    apply_overrides(before, ["steps=7", "data.sources.0.weight=9", "data.mixture.en=1"])
    assert before == toy.config.as_buildable()


@pytest.mark.parametrize(
    "override, message",
    [
        ("steps=many", "steps takes int, not 'many' (str)"),
        ("steps=50.0", "steps takes int, not 50.0 (float)"),
        ("steps=true", "steps takes int, not True (bool)"),
        ("steps=none", "steps takes int, not None"),
        ("workdir=none", None),
        ("block.ffn.router.normalise=1", "takes bool, not 1 (int)"),
        ("block.ffn.router.temperature=true", "takes float, not True (bool)"),
        ("block.window=wide", "block.window takes int or None, not 'wide' (str)"),
        ("block.remat=some", "block.remat takes one of 'none', 'full', not 'some' (str)"),
        ("data.betas=0.9", "data.betas takes tuple[float, float], not 0.9 (float)"),
        ("data.betas=1,2,3", "takes tuple[float, float], not (1, 2, 3)"),
        ("data.sizes=a,b", "data.sizes takes list[int], not 'a,b' (str)"),
        ("block.ffn.dtype=float33", "not 'float33' (str)"),
        ("block.ffn=2", "block.ffn takes Module, not 2 (int)"),
        ("block.ffn=FFN", "name a component as module.path:Class or file.py:Class"),
        ("block.ffn=toy_experiment:Text", "not the component toy_experiment:Text"),
        ("block.ffn.router=toy_experiment:NoRouter", "(it lacks describe)"),
        ("steps", "an override has the form path=value, such as steps=50, not 'steps'"),
        ("=5", "an override has the form path=value"),
    ],
)
def test_a_wrong_value_names_path_type_and_value(override, message):
    if message is None:
        assert overridden(override).workdir == "none"
    else:
        assert message in error_of(override)


@pytest.mark.parametrize(
    "path, nearest",
    [
        ("router.k", "block.ffn.router.k"),
        ("k", "block.ffn.router.k"),
        ("block.ffn.routr.k", "block.ffn.router.k"),
        ("model.block.ffn.router.k", "block.ffn.router.k"),
        ("stesp", "steps"),
        ("data.sources.0.wieght", "data.sources.0.weight"),
        ("block.ffn.router.temprature", "block.ffn.router.temperature"),
    ],
)
def test_an_unknown_path_names_the_nearest(path, nearest):
    message = error_of(f"{path}=1")
    assert message.startswith(f"there is no parameter {path!r}; the nearest are: {nearest}")


def test_an_index_out_of_range_says_how_many_there_are():
    assert "(data.sources has 2 elements, counted from 0)" in error_of("data.sources.2.weight=1")


@pytest.mark.parametrize("name", ["name", "parent"])
def test_linens_own_fields_are_hidden(name):
    message = error_of(f"block.{name}=x")
    assert f"there is no parameter 'block.{name}'" in message
    assert f"block.{name}," not in message.partition(";")[2]


def test_below_none_the_error_says_what_to_set_first():
    assert error_of("extra.k=1") == (
        "there is no parameter 'extra.k': extra is None; give it a component first "
        "(extra=module.path:Class)"
    )


def test_swap_keeps_shared_arguments_and_notes_the_dropped(capsys):
    swapped = overridden(
        "block.ffn.router.temperature=0.5", "block.ffn.router=toy_experiment:Expert"
    )
    router = swapped.block.ffn.router
    assert fdl.get_callable(router) is toy.Expert
    assert router.temperature == 0.5
    assert router.capacity == 1.25
    assert capsys.readouterr().err == (
        "note: block.ffn.router: dropped k=2, which toy_experiment:Expert does not take\n"
    )
    assert fdl.build(swapped).block.ffn.router.describe() == "expert choice 1.25"


def test_a_default_of_the_old_component_is_not_kept():
    router = overridden("block.ffn.router=toy_experiment:Expert", note=str).block.ffn.router
    assert router.temperature == 3.0


def test_later_overrides_reach_inside_a_swapped_component():
    swapped = overridden(
        "block.ffn.router=toy_experiment:Expert", "block.ffn.router.capacity=2", note=str
    )
    assert swapped.block.ffn.router.capacity == 2.0


def test_overrides_reach_inside_a_default_that_a_factory_makes():
    config = toy.config.as_buildable()
    del config.block.ffn.router
    config = apply_overrides(config, ["block.ffn.router.k=7"])
    assert fdl.build(config).block.ffn.router.k == 7


def test_swap_to_none_and_from_none():
    with_extra = overridden("extra=toy_experiment:Top", "extra.k=1")
    assert with_extra.extra.k == 1
    assert apply_overrides(with_extra, ["extra=none"]).extra is None


def test_swap_to_a_class_in_a_file(tmp_path):
    file = tmp_path / "my_router.py"
    file.write_text(
        "import toy_experiment as toy\n\nclass Mine(toy.Top):\n    sharpness: float = 2.0\n"
    )
    router = overridden(f"block.ffn.router={file}:Mine").block.ffn.router
    assert (router.k, router.sharpness) == (2, 2.0)


@pytest.mark.parametrize(
    "made",
    [
        nn.initializers.normal(0.3),
        nn.initializers.truncated_normal(0.3, jnp.bfloat16),
        nn.initializers.variance_scaling(2.0, "fan_avg", "uniform", in_axis=1, out_axis=2),
        nn.initializers.orthogonal(2.0),
        nn.initializers.constant(4.0),
    ],
    ids=lambda made: made.__qualname__,
)
def test_a_made_initialiser_becomes_a_config_of_what_made_it(made):
    config = paths.as_config(made)
    assert isinstance(config, fdl.Config)
    args = (jax.random.key(0), (2, 3, 4) if "variance" in made.__qualname__ else (3, 4))
    rebuilt = fdl.build(config)(*args)
    assert rebuilt.dtype == made(*args).dtype
    assert (rebuilt == made(*args)).all()


def test_the_default_of_an_initialiser_can_be_overridden():
    init = overridden("block.ffn.init.stddev=0.5").block.ffn.init
    assert (fdl.get_callable(init), init.stddev) == (jax.nn.initializers.normal, 0.5)


def test_an_initialiser_given_by_its_factory_is_built():
    ffn = overridden("block.ffn.init=jax.nn.initializers:normal", "block.ffn.init.stddev=0.5")
    assert ffn.block.ffn.init.stddev == 0.5
    assert overridden("block.ffn.init=jax.nn.initializers:zeros").block.ffn.init is (
        nn.initializers.zeros
    )


@pytest.mark.parametrize(
    "symbol, message",
    [
        ("toy_experiment:Tip", "did you mean toy_experiment:Top"),
        ("moejax.routrs.topk:TopK", "there is no module 'moejax.routrs.topk'; did you mean"),
        ("nowhere:Top", "there is no module 'nowhere'"),
        ("nowhere.py:Top", "there is no file 'nowhere.py'"),
    ],
)
def test_an_unknown_component_names_the_nearest(symbol, message):
    assert message in error_of(f"block.ffn.router={symbol}")


def test_a_field_that_the_owner_of_a_prototype_sets_names_the_owner():
    swap = "extra=toy_experiment:Projects"
    assert overridden(swap, "extra.projection.scale=2").extra.projection.scale == 2.0
    assert error_of(swap, "extra.projection.width=7") == (
        "extra.projection.width has no effect: toy_experiment:Projects sets it in every copy that "
        "it makes of extra.projection; leave it out"
    )
