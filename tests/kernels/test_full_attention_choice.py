"""Which implementation attention takes on which device, and what keeps each from a call."""

import logging

import jax
import jax.numpy as jnp
import pytest

from moejax.errors import UserError
from moejax.kernels import accepted, compat, dispatch, full_attention
from moejax.kernels.full_attention import full_attention as attend
from tests.kernels.test_full_attention_memory import PLATFORMS, as_on

IDS = jnp.ones((1, 256), jnp.int32)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path, unchecked):
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))
    monkeypatch.setattr(compat, "has_cudnn", lambda: True)
    dispatch._announce.cache_clear()


@pytest.fixture
def taken(monkeypatch):
    """The names of the implementations that calls take, which are replaced by the definition."""
    names, load = [], full_attention.module
    definition = load("reference")

    class _Spy:
        def __init__(self, name):
            self.name, self.obstacle = name, load(name).obstacle

        def attention(self, *call):
            names.append(self.name)
            return definition.attention(*call)

    monkeypatch.setattr(full_attention, "module", _Spy)
    return names


def call(length=256, width=64, value_width=64, dtype=jnp.bfloat16, keys=None, **options):
    q = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
    k = jax.ShapeDtypeStruct((1, keys or length, 1, width), dtype)
    v = jax.ShapeDtypeStruct((1, keys or length, 1, value_width), dtype)
    jax.eval_shape(lambda *x: attend(*x, **options), q, k, v)


def accept(platform, name):
    choice = {"bfloat16": dict.fromkeys(full_attention.PRODUCTS, name)}
    accepted.store(PLATFORMS[platform][1], {"full_attention": choice}, {})


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_where_nothing_was_accepted_it_is_scan_and_a_warning_names_the_command(
    taken, caplog, platform
):
    with as_on(platform), caplog.at_level(logging.INFO, "moejax.kernels.dispatch"):
        call()
        call()
    assert taken == ["scan", "scan"]
    (record,) = caplog.records  # once
    assert record.levelno == logging.WARNING
    assert "full_attention (bfloat16): implementation 'scan'" in record.message
    assert "run moejax verify-kernels --accept there" in record.message


def test_where_nothing_else_could_serve_there_is_no_warning(taken, caplog):
    with as_on("cuda"), caplog.at_level(logging.INFO, "moejax.kernels.dispatch"):
        call(segment_ids=IDS)
    assert taken == ["scan"]
    assert [r.levelno for r in caplog.records] == [logging.INFO]


@pytest.mark.parametrize("platform, name", [("cuda", "cudnn"), ("tpu", "splash")])
def test_what_was_accepted_is_taken_for_the_calls_that_it_serves(taken, platform, name):
    accept(platform, name)
    with as_on(platform):
        call()
        call(window=100)
        call(length=200, keys=256, q_offset=3)
    assert taken == [name, name, "scan"]


def test_on_cpu_it_is_scan_as_shipped(taken):
    with as_on("cpu"):
        call()
    assert taken == ["scan"]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": jnp.float32}, "takes bfloat16 and float16, and these are float32"),
        ({"value_width": 32}, "of one width, and these are of 64 and 32"),
        ({"width": 60, "value_width": 60}, "multiple of 8 up to 128, and this is 60"),
        ({"width": 256, "value_width": 256}, "multiple of 8 up to 128, and this is 256"),
        ({"segment_ids": IDS}, "no packed rows"),
        ({"keys": 300}, "one query for each key"),
        ({"sinks": jnp.zeros(2)}, "no sinks"),
        ({"soft_cap": 5.0}, "no soft_cap"),
    ],
)
def test_cudnn_refuses_what_it_cannot_express(options, reason):
    with as_on("cuda"), pytest.raises(UserError, match=reason):
        call(**options, implementation="cudnn")


def test_cudnn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(compat, "has_cudnn", lambda: False)
    with as_on("cuda"), pytest.raises(UserError, match=r"no cuDNN: install jax\[cuda13\]"):
        call(implementation="cudnn")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": jnp.float16}, "takes bfloat16 and float32, and these are float16"),
        ({"length": 200}, "multiples of 128, and these are 200 and 200"),
    ],
)
def test_splash_refuses_what_it_cannot_express(options, reason):
    with as_on("tpu"), pytest.raises(UserError, match=reason):
        call(**options, implementation="splash")


def test_splash_refuses_an_offset_that_is_not_known_yet():
    q, kv = jnp.ones((1, 128, 2, 64)), jnp.ones((1, 256, 1, 64))
    run = lambda offset: attend(q, kv, kv, q_offset=offset, implementation="splash")
    with as_on("tpu"), pytest.raises(UserError, match="q_offset must be known before"):
        jax.eval_shape(run, jnp.int32(3))


def test_splash_refuses_what_the_compiler_would_have_to_split():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto)
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.float32)
    run = lambda x: attend(x, x, x, implementation="splash")
    with compat.interpret_tpu(), jax.set_mesh(mesh):
        with pytest.raises(UserError, match="on several devices it must be called inside"):
            jax.eval_shape(run, x)
        checked = jax.shard_map(run, in_specs=jax.P("data"), out_specs=jax.P("data"))
        with pytest.raises(UserError, match="inside a shard_map with check_vma=True"):
            jax.eval_shape(checked, x)
        unchecked = jax.shard_map(
            run, in_specs=jax.P("data"), out_specs=jax.P("data"), check_vma=False
        )
        assert jax.eval_shape(unchecked, x).shape == x.shape
