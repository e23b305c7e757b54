"""What depends on the platform: compiler options, and what counts as a kernel there."""

import jax
import jax.numpy as jnp
import pytest

from moejax.kernels import compat


@pytest.fixture
def platform(monkeypatch):
    return lambda name: monkeypatch.setattr(compat, "target_platform", lambda: name)


def test_compiler_options_are_for_cpu_alone(platform):
    platform("cpu")
    options = compat.compiler_options()
    assert options
    assert jax.jit(jnp.sin, compiler_options=options)(jnp.zeros(2)).sum() == 0
    platform("tpu")
    assert compat.compiler_options() == {}
