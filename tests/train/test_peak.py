"""The peak of a device by its kind."""

import types

import jax
import pytest

from moejax.train.peak import peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("NVIDIA L4", None),
    ],
)
def test_the_longest_name_that_fits(monkeypatch, kind, peak):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert peak_flops() == (None if peak is None else 4 * peak)
