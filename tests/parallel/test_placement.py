"""Where devices stand in a mesh: on described tori and slices, without a TPU compiler."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.parallel.mesh import AXES, Mesh
from moejax.parallel.placement import by_slice, placed


@dataclasses.dataclass(frozen=True)
class Device:
    """What placement asks of a device."""

    id: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    process_index: int = 0


def torus(*bounds, slice_index=0, **kind):
    """The devices of one slice, x fastest."""
    places = itertools.product(*(range(n) for n in reversed(bounds)))
    first = slice_index * 100_000
    return [
        Device(first + i, tuple(reversed(p)), slice_index=slice_index, **kind)
        for i, p in enumerate(places)
    ]


def sizes(**given):
    return dict.fromkeys(AXES, 1) | given


def steps_along(mesh, axis):
    """The coordinates in which neighbours along a mesh axis differ."""
    moved = np.moveaxis(mesh, AXES.index(axis), 0)
    pairs = zip(moved[:-1].flat, moved[1:].flat, strict=True)
    return {i for a, b in pairs for i in range(3) if a.coords[i] != b.coords[i]}


def test_every_axis_follows_the_torus():
    mesh = placed(torus(4, 4, 8), sizes(fsdp=8, expert=16))
    assert mesh.shape == (1, 8, 16, 1, 1)
    assert len(set(mesh.flat)) == 128
    assert steps_along(mesh, "fsdp") == {2}  # the long side
    assert steps_along(mesh, "expert") == {0, 1}  # a plane


def test_axes_that_divide_no_side_are_split_over_several():
    """As 16 x 32 on 8 x 8 x 8, which `jax.make_mesh` refuses."""
    mesh = placed(torus(8, 8, 8), sizes(fsdp=16, expert=32))
    assert mesh.shape == (1, 16, 32, 1, 1)
    assert len(set(mesh.flat)) == 512


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_flat_slices(kind):
    mesh = placed(torus(4, 8, 1, device_kind=kind), sizes(data=2, fsdp=4, expert=4))
    assert mesh.shape == (2, 4, 4, 1, 1)
    assert len(set(mesh.flat)) == 32


def test_data_spans_slices_and_the_other_axes_lie_within_one():
    devices = [d for i in range(3) for d in torus(2, 2, 2, slice_index=i)]
    mesh = placed(devices, sizes(data=6, fsdp=2, expert=2))
    slices = np.vectorize(lambda d: d.slice_index)(mesh)
    np.testing.assert_array_equal(slices[:, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2])
    assert (slices == slices[:, :1, :1, :1, :1]).all()
    assert len(set(mesh.flat)) == 24


def test_the_order_of_the_devices_does_not_matter_to_slices():
    devices = [d for i in (1, 0) for d in torus(2, 2, 1, slice_index=i)]
    assert [part[0].slice_index for part in by_slice(devices)] == [0, 1]


def test_a_model_axis_wider_than_a_slice_is_refused():
    devices = [d for i in range(2) for d in torus(2, 2, 1, slice_index=i)]
    with pytest.raises(UserError, match=r"expert=8, .*take 8 devices .* a slice of 4"):
        placed(devices, Mesh(expert=8).sizes(8))


def test_slices_must_be_used_alike():
    devices = [d for i in range(2) for d in torus(2, 2, 1, slice_index=i)]
    with pytest.raises(UserError, match=r"2 and 4 devices of different slices"):
        placed(devices[:6], Mesh(data=6).sizes(8))


def test_the_first_devices_need_not_be_a_box():
    mesh = placed(torus(2, 2, 2)[:6], sizes(data=6))
    assert [d.id for d in mesh.flat] == list(range(6))


def test_graphics_cards_go_host_by_host():
    devices = [
        Device(
            i, platform="gpu", device_kind="NVIDIA H100", process_index=i // 8, slice_index=i // 8
        )
        for i in reversed(range(32))
    ]
    mesh = placed(devices, sizes(fsdp=4, expert=8))  # fsdp spans hosts, which is allowed there
    assert [d.process_index for d in mesh[0, :, 0, 0, 0]] == [0, 1, 2, 3]
    assert len({d.process_index for d in mesh[0, 0].flat}) == 1


def test_simulated_devices_keep_their_order():
    mesh = Mesh(fsdp=2, expert=4).build()
    assert list(mesh.devices.flat) == jax.devices()
