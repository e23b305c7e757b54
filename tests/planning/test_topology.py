"""Names of clusters: what exists, what is refused, and what it says then."""

import importlib.util

import jax
import pytest

from moejax.errors import UserError
from moejax.planning.chips import CHIPS
from moejax.planning.topology import H100_TARGET, existing, parse


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("v5p:8x8x8", 512),
        ("v5p:2x2x1", 4),
        ("v5p:4x4x4*2", 128),
        ("v6e:16x16", 256),
        ("v5e:2x4", 8),
        ("tpu7x:4x4x4", 128),  # two devices a chip
        ("h100:64x8", 512),
        ("cpu:8", 8),
    ],
)
def test_counts_devices_and_keeps_its_name(text, devices):
    topology = parse(text)
    assert topology.num_devices == devices
    assert topology.name == text


def test_slices_may_be_stated_apart():
    assert parse("v5p:4x4x4", num_slices=4) == parse("v5p:4x4x4*4")
    assert parse("v5p:4x4x4*4", num_slices=4).num_slices == 4
    with pytest.raises(UserError, match=r"has 4 slices and --slices says 2: state one"):
        parse("v5p:4x4x4*4", num_slices=2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:2x2", r"no topology 'v9:2x2': write v5p:8x8x8, .* one of v5e, v5p, v6e, tpu7x, h100"),
        ("v5p", r"no topology 'v5p': write"),
        ("v5p:", r"no topology 'v5p:': write"),
        ("v5e:3x5", r"no topology 'v5e:3x5'; v5e has 1x1, 2x2, .*16x16$"),
        ("v5e:32x32", r"v5e has 1x1"),  # libtpu would take it
        ("v6e:4x4x4", r"v6e has 1x1"),
        ("v5p:8x8", r"v5p has 2x2x1, .* multiples of 4 in rising order, .* up to 6144 chips"),
        ("v5p:8x8x4", r"in rising order"),
        ("v5p:16x16x28", r"of up to 6144 chips"),
        ("h100:8x3", r"h100 has up to 1024 hosts of 1, 2, 4 or 8"),
        ("h100:8x8*2", r"h100 has no slices"),
        ("cpu:8x8", r"any number of simulated devices"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text, says):
    with pytest.raises(UserError, match=says):
        parse(text)


def test_every_chip_says_what_exists_and_has_figures():
    for chip in CHIPS.values():
        assert existing(chip)
        assert 0 < chip.slow < chip.fast < chip.bandwidth < chip.flops
        assert chip.memory > 2**33


def test_simulated_devices_are_those_of_this_machine():
    assert parse("cpu:4").devices() == jax.devices()[:4]
    with pytest.raises(UserError, match="cpu:16 needs 16 .* there are 8: set JAX_NUM_CPU_DEVICES"):
        parse("cpu:16").devices()


@pytest.mark.parametrize(
    ("text", "extra"), [("v5p:2x2x1", r"moejax\[tpu\]"), ("h100:1x8", r"moejax\[cuda\]")]
)
def test_a_compiler_that_is_not_installed_names_the_extra(text, extra, monkeypatch):
    found = importlib.util.find_spec
    compilers = ("libtpu", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in compilers else found(name)
    )
    with pytest.raises(
        UserError, match=rf"compiler, which is not installed: pip install '{extra}'"
    ):
        parse(text).devices()


def test_the_described_gpu_is_an_h100():
    text = H100_TARGET.read_text()
    assert CHIPS["h100"].kind in text
    assert f"device_memory_size: {CHIPS['h100'].memory}" in text
