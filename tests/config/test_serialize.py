"""Stored configs: exact round trips, and changes of the code since."""

import functools
import json
import math

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_experiment as toy

from moejax.config.check import check_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.config.serialize import dump_config, load_dumped
from moejax.config.text import config_text
from moejax.errors import UserError

VERSIONS = {"jax": jax.__version__}


def round_trip(config, **kwargs):
    return load_dumped(dump_config(config, VERSIONS), **kwargs)


def test_round_trip_is_equal_builds_and_is_stable():
    config = toy.config.as_buildable()
    text = dump_config(config, VERSIONS)
    loaded = load_dumped(text)
    assert loaded == config
    assert fdl.build(loaded) == fdl.build(config)
    assert config_text(loaded) == config_text(config)
    assert dump_config(loaded, VERSIONS) == text


def test_the_document_is_readable():
    document = json.loads(dump_config(toy.config.as_buildable(), VERSIONS))
    assert document["format"] == 1
    assert document["versions"] == VERSIONS
    assert document["config"]["__call__"] == "toy_experiment:Run"
    router = document["config"]["args"]["block"]["args"]["ffn"]["args"]["router"]
    assert router == {
        "__call__": "toy_experiment:Top",
        "args": {"k": 2},
        "defaults": {"temperature": 1.0, "normalise": True},
    }
    assert list(document["sources"]) == ["toy_experiment"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        1.0,
        0.1 + 0.2,
        5e-324,
        10**30,
        math.inf,
        -math.inf,
        "text",
        "",
        "__call__",
        (1, (2,)),
        [1, [2.0, (3,)]],
        (),
        {},
        {"a": (1,)},
        {"__call__": "os:system"},
        {"__tuple__": [1]},
        {1: "a", None: "b", (1, 2): "c"},
        jnp.bfloat16,
        jnp.float8_e4m3fn,
        np.float32,
        np.dtype("int32"),
        jnp.dtype("bfloat16"),
        jax.nn.gelu,
        optax.adamw,
        toy.Top,
    ],
    ids=lambda v: getattr(v, "__qualname__", None) or repr(v),  # the same in every process
)
def test_values_come_back_exactly(value):
    config = toy.config.as_buildable()
    config.note = value
    got = round_trip(config).note
    assert got == value
    assert repr(got) == repr(value)
    assert type(got) is type(value)


def test_nan_comes_back():
    config = toy.config.as_buildable()
    config.note = math.nan
    assert math.isnan(round_trip(config).note)


def test_partials_positional_arguments_and_initialisers_come_back():
    config = toy.config.as_buildable()
    config.note = [
        fdl.Config(optax.chain, fdl.Config(optax.clip, 1.0), fdl.Config(optax.sgd, 0.1)),
        fdl.Partial(jax.nn.leaky_relu, negative_slope=0.2),
        fdl.Config(jax.nn.initializers.normal, stddev=0.3),
    ]
    loaded = round_trip(config)
    assert loaded == config
    assert fdl.build(loaded).note[1](-1.0) == pytest.approx(-0.2)


def test_a_default_that_has_changed_since_is_set_explicitly():
    document = json.loads(dump_config(toy.config.as_buildable(), VERSIONS))
    document["config"]["defaults"]["workdir"] = "runs/older"
    loaded = load_dumped(json.dumps(document))
    assert loaded.__arguments__["workdir"] == "runs/older"
    assert "extra" not in loaded.__arguments__


def test_a_parameter_that_is_gone_is_named():
    document = json.loads(dump_config(toy.config.as_buildable(), VERSIONS))
    document["config"]["args"]["gone"] = 1
    with pytest.raises(UserError, match="toy_experiment:Run of this version .* no parameter gone"):
        load_dumped(json.dumps(document))


@pytest.mark.parametrize(
    "value, message",
    [
        (object(), "note holds <object"),
        (np.ones(2), "note holds array"),
        ({1, 2}, r"note holds \{1, 2\} \(set\)"),
        (lambda x: x, "note: test_serialize:<lambda> cannot be stored"),
        (functools.partial(max, 1), "note holds functools.partial"),
    ],
)
def test_what_cannot_be_stored_is_named(value, message):
    config = toy.config.as_buildable()
    config.note = value
    with pytest.raises(UserError, match=message):
        dump_config(config, VERSIONS)


def test_a_local_class_cannot_be_stored():
    class Local(toy.Top):
        pass

    config = toy.config.as_buildable()
    config.extra = fdl.Config(Local)
    with pytest.raises(UserError, match="define it at the top level of a file, under its own name"):
        dump_config(config, VERSIONS)


def test_a_shared_component_cannot_be_stored():
    config = toy.config.as_buildable()
    config.extra = config.block.ffn.router
    with pytest.raises(UserError, match="one and the same object"):
        dump_config(config, VERSIONS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no stored config"),
        ("[]", "no stored config"),
        ("{}", "no stored config"),
        ('{"format": 9}', "has format 9, and this version of moejax reads format 1"),
        ('{"format": 1, "sources": {}, "config": {"a": 1}}', "no stored config"),
        ('{"format": 1, "sources": {}, "config": {"__call__": 3}}', "by a string, not by 3"),
        (
            '{"format": 1, "sources": {}, "config": {"__call__": "optax:adam", "args": 3}}',
            "damaged",
        ),
    ],
)
def test_a_damaged_document_is_an_error(text, message):
    with pytest.raises(UserError, match=message):
        load_dumped(text)


def test_a_run_folder_is_loaded_and_overridden(tmp_path):
    (tmp_path / "config.json").write_text(dump_config(toy.config.as_buildable(), VERSIONS))
    config = apply_overrides(load_config(tmp_path), ["steps=7"])
    assert check_config(config).steps == 7
    assert load_config(tmp_path / "config.json").steps == 100
    with pytest.raises(UserError, match="holds a stored config and no function"):
        load_config(f"{tmp_path}:smoke")


def test_an_older_default_of_what_the_owner_of_a_prototype_sets_is_no_change():
    config = toy.config.as_buildable()
    config.extra = fdl.Config(toy.Projects)
    document = json.loads(dump_config(config, {}))
    projection = document["config"]["args"]["extra"]["defaults"]["projection"]
    assert "width" not in projection["defaults"]
    projection["defaults"]["width"] = 3  # as an earlier version would have written it
    assert check_config(load_dumped(json.dumps(document), trusted=True)) == config
