"""Which layouts `verify` tries."""

import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.verification.variants import meshes, variants


@pytest.mark.parametrize("num_devices", [1, 2, 4, 6, 8, 16])
def test_meshes_use_all_devices_and_none_comes_twice(num_devices):
    found = meshes(num_devices)
    for shape in found:
        size = 1
        for n in shape.values():
            size *= n
        assert size == num_devices
    assert len({frozenset(shape.items()) for shape in found}) == len(found)


def test_every_axis_is_tried_alone_and_with_every_two_others():
    found = meshes(8)
    assert {"expert": 8} in found
    assert {"data": 2, "expert": 2, "tensor": 2} in found
    assert len(found) == 5 + 10


def test_names_are_unique_and_every_kind_is_there():
    experiment = build_config(load_config("configs/tiny.py:smoke"))
    names = [v.name for v in variants(experiment, experiment.build_model(64), 8)]
    assert len(set(names)) == len(names)
    for kind in (
        "context=8",
        "least_loaded on",
        "experts by definition",
        "remat full",
        "padding",
        "2 microbatches",
    ):
        assert any(kind in name for name in names), kind
