import logging

import jax
import pytest

from moejax.errors import UserError
from moejax.kernels import compat, dispatch

AVAILABLE = ("tile_scan", "xla")


@pytest.fixture
def platform(monkeypatch):
    dispatch._announce.cache_clear()
    yield lambda name: monkeypatch.setattr(compat, "target_platform", lambda: name)
    dispatch._announce.cache_clear()


@pytest.mark.parametrize("name, want", [("cpu", "tile_scan"), ("gpu", "tile_scan"), ("tpu", "xla")])
def test_default_by_platform(platform, name, want):
    platform(name)
    assert dispatch.choose("kernel", None, AVAILABLE) == want


def test_says_its_choice_once(platform, caplog):
    platform("cpu")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            dispatch.choose("kernel", None, AVAILABLE)
    (record,) = caplog.records
    assert "kernel" in record.message
    assert "tile_scan" in record.message
    assert "cpu" in record.message


def test_a_named_implementation_is_used_or_refused(platform):
    platform("tpu")
    assert dispatch.choose("kernel", "tile_scan", AVAILABLE) == "tile_scan"
    with pytest.raises(UserError, match="kernel has no implementation 'nope'"):
        dispatch.choose("kernel", "nope", AVAILABLE)


def test_the_mesh_decides_the_platform():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    assert compat.target_platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert compat.target_platform() == "tpu"


def test_an_unannounced_choice_is_announced_when_it_runs(platform, caplog):
    platform("cpu")
    with caplog.at_level(logging.INFO):
        with dispatch.unannounced():
            assert dispatch.choose("kernel", None, AVAILABLE) == "tile_scan"
        assert not caplog.records
        dispatch.choose("kernel", None, AVAILABLE)
    assert len(caplog.records) == 1
