"""The mesh: what the sizes mean, and every way in which they can be wrong."""

import jax
import pytest

from moejax.errors import UserError
from moejax.parallel.mesh import AXES, Mesh


def test_data_takes_what_the_others_leave():
    assert Mesh(expert=4).sizes(8) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1, "context": 1}
    assert Mesh().sizes(8)["data"] == 8
    assert Mesh(data=1).sizes(8)["data"] == 1


def test_builds_automatic_axes_over_the_first_devices():
    mesh = Mesh(data=1, fsdp=2, tensor=2).build()
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ({"expert": 16}, r"needs 16 devices and there are 8 \(mesh.data=1, mesh.fsdp=1, mesh.exp"),
        ({"data": 4, "fsdp": 4}, r"needs 16 devices and there are 8"),
        ({"fsdp": 3}, r"mesh.fsdp=3, .* do not divide the 8 devices"),
    ],
)
def test_sizes_that_do_not_fit_name_the_axes(mesh, text):
    with pytest.raises(UserError, match=text):
        Mesh(**mesh).build()


def test_sizes_start_at_one():
    with pytest.raises(UserError, match=r"mesh.tensor=0 must be at least 1"):
        Mesh(tensor=0)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"batch_size": 12, "sequence_length": 8}, r"batch_size / num_microbatches = 12 .* 8 ways"),
        ({"batch_size": 16, "sequence_length": 9}, r"sequence_length = 9 .* \(mesh.context=2\)"),
    ],
)
def test_a_batch_that_cannot_be_split_names_the_number(sizes, text):
    with pytest.raises(UserError, match=text):
        Mesh(data=2, expert=4, context=2).check_batch(16, **sizes)


def test_a_run_of_several_processes_must_use_every_device(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="uses 4 of 8 devices.*set it to 8"):
        Mesh(data=4).build()
