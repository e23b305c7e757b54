"""Which layouts `verify` tries."""

import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.transport.least_loaded import LeastLoaded
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


def test_meshes_are_every_way_to_give_the_devices_to_the_axes():
    found = meshes(8)
    assert [len(shape) for shape in found] == 5 * [1] + 20 * [2] + 10 * [3]
    assert {"expert": 8} in found
    assert {"fsdp": 4, "tensor": 2} in found
    assert {"fsdp": 2, "tensor": 4} in found
    assert {"data": 2, "expert": 2, "tensor": 2} in found


def test_meshes_of_two_primes_take_them_in_either_order():
    assert {"fsdp": 3, "expert": 2} in meshes(6)
    assert {"fsdp": 2, "expert": 3} in meshes(6)
    assert len(meshes(6)) == 5 + 20


def test_one_device_has_one_mesh():
    assert meshes(1) == [{}]


def test_names_are_unique_and_every_kind_is_there():
    experiment = build_config(load_config("configs/tiny.py:smoke"))
    names = [v.name for v in variants(experiment, experiment.build_model(64), 8)]
    assert len(set(names)) == len(names)
    for kind in (
        "context=8",
        "least_loaded on",
        "experts by definition",
        "attention by definition",
        "remat full",
        "padding",
        "2 microbatches",
        "fsdp=2 expert=4",
    ):
        assert any(kind in name for name in names), kind


@pytest.mark.parametrize("num_devices", [2, 4, 6, 8])
def test_what_saves_memory_is_combined_where_experts_are_split(num_devices):
    experiment = build_config(load_config("configs/tiny.py:smoke"))
    combined = [
        v
        for v in variants(experiment, experiment.build_model(64), num_devices)
        if v.padding and v.model.remat == "full" and v.experiment.num_microbatches == 2
    ]
    assert combined
    for variant in combined:
        assert variant.experiment.mesh.expert > 1
        assert isinstance(variant.model.moe.transport, LeastLoaded)
        assert variant.model.moe.transport.skip_below == 1.0  # so that experts do move
        assert not variant.replayable
        variant.experiment.mesh.check_batch(
            num_devices, batch_size=num_devices, sequence_length=24
        )  # 2 sequences per device, in 2 microbatches
