"""The start-up check passes right backends, and names wrong ones and what to use instead."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.parallel.canary import check_exchange, pattern
from moejax.parallel.exchange import BACKENDS
from tests.parallel.simulated import emulate_ragged, mesh_of

MESH = mesh_of(data=2, expert=4)


@pytest.mark.parametrize("num_devices", [2, 3, 4, 5, 8, 16])
def test_the_pattern_is_lopsided(num_devices):
    sizes = pattern(num_devices)
    one_sided = (sizes > 0) & (sizes.T == 0)
    assert one_sided.any()
    assert sizes.max() > 16
    assert len(np.unique(sizes)) > min(num_devices, 10)
    assert not np.array_equal(sizes, sizes.T)
    if num_devices > 3:
        assert not sizes.any(1).all()
        assert not sizes.any(0).all()


@pytest.mark.parametrize("backend", [None, "gather", "ragged"])
def test_right_backends_pass(backend, monkeypatch):
    emulate_ragged(monkeypatch)
    check_exchange(MESH, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"expert": 8}, {"tensor": 2, "expert": 2, "data": 2}])
def test_any_mesh_will_do(axes):
    check_exchange(mesh_of(**axes))


def test_one_device_has_nothing_to_check(monkeypatch):
    monkeypatch.setitem(BACKENDS, "two_hop", None)
    check_exchange(mesh_of(data=8, expert=1))


def lost_last_row(move, rows, **options):
    """The last row that arrives on each device is lost."""
    out = move(rows, **options)
    last = options["traffic"].sizes[:, lax.axis_index(options["axis"])].sum() - 1
    place = jnp.arange(options["num_rows"])
    return [jnp.where((place == last)[:, None], 0, leaf) for leaf in out]


def garbage_behind(move, rows, **options):
    """What nothing was written to is not zero."""
    return [leaf.at[-1].set(1) for leaf in move(rows, **options)]


def scaled_backwards(move, rows, **options):
    """Cotangents arrive times the number of devices."""
    times = lax.axis_size(options["axis"]) if is_backward(rows) else 1
    return [leaf * times for leaf in move(rows, **options)]


def overwritten_backwards(move, rows, **options):
    """Of two rows that return to one place's neighbourhood the later one wins."""
    out = move(rows, **options)
    return [leaf.at[0].set(leaf[1]) for leaf in out] if is_backward(rows) else out


def bad_bfloat16(move, rows, **options):
    """Two rows change places, in one dtype only."""
    swap = lambda leaf: leaf.at[:2].set(leaf[1::-1])
    out = move(rows, **options)
    return [swap(leaf) if leaf.dtype == jnp.bfloat16 else leaf for leaf in out]


def one_bad_device(move, rows, **options):
    """One device of all in the mesh gets the wrong sign."""
    is_bad = (lax.axis_index("data") == 1) & (lax.axis_index("expert") == 3)
    return [jnp.where(is_bad, -leaf, leaf) for leaf in move(rows, **options)]


def is_backward(rows):
    sizes = pattern(4)
    rows_forwards, rows_backwards = (int(sizes.sum(axis).max()) for axis in (1, 0))
    assert rows_forwards != rows_backwards
    return rows[0].shape[0] - rows_backwards == 3


def plant(monkeypatch, name, fault):
    move = BACKENDS[name]
    wrong = lambda rows, traffic, **options: fault(move, rows, traffic=traffic, **options)
    monkeypatch.setitem(BACKENDS, name, wrong)


FAULTS = {
    lost_last_row: {"forwards", "backwards"},
    garbage_behind: {"forwards", "backwards"},
    scaled_backwards: {"backwards"},
    overwritten_backwards: {"backwards"},
    bad_bfloat16: {"forwards", "backwards"},
    one_bad_device: {"forwards", "backwards"},
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_backend_is_named_with_direction_and_remedy(fault, monkeypatch):
    plant(monkeypatch, "two_hop", fault)
    with pytest.raises(UserError) as caught:
        check_exchange(MESH)
    message = str(caught.value)
    assert "exchange='two_hop' delivers" in message
    assert "set transport.exchange='gather', which passed" in message
    assert {word for word in ("forwards", "backwards") if word in message} == FAULTS[fault]
    assert ("float32" in message) == (fault is not bad_bfloat16)
    assert "bfloat16" in message


@pytest.mark.long
def test_the_remedy_is_the_cheapest_that_passes(monkeypatch):
    emulate_ragged(monkeypatch)
    plant(monkeypatch, "ragged", lost_last_row)
    with pytest.raises(UserError, match="'ragged' delivers .* set transport.exchange='two_hop'"):
        check_exchange(MESH)
    plant(monkeypatch, "two_hop", scaled_backwards)
    with pytest.raises(UserError, match="'ragged' delivers .* set transport.exchange='gather'"):
        check_exchange(MESH)
    plant(monkeypatch, "gather", one_bad_device)
    with pytest.raises(UserError, match="'ragged' delivers .* no other backend passed"):
        check_exchange(MESH)


def test_weights_that_several_devices_want_are_checked(monkeypatch):
    """A driver that takes ranges to lie one behind another serves rows, but not copies of one."""
    emulate_ragged(monkeypatch)
    right = lax.ragged_all_to_all

    def packed(operand, output, starts, sizes, *rest, **options):
        starts = jnp.minimum(jnp.cumsum(sizes) - sizes, operand.shape[0] - sizes)
        return right(operand, output, starts, sizes, *rest, **options)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", packed)
    with pytest.raises(UserError, match="'ragged' delivers") as caught:
        check_exchange(MESH)
    message = str(caught.value)
    assert "wrong rows of weights in float32" in message
    assert "gradients" not in message
    assert not {"forwards", "backwards"} & set(message.split())
    assert "set transport.exchange='two_hop', which passed" in message


def test_a_backend_that_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr(compat, "target_platform", lambda: "tpu")  # and XLA has none on CPU
    with pytest.raises(UserError, match=r"'ragged' does not run \(.*\).*exchange='two_hop'"):
        check_exchange(MESH)


def test_what_cannot_be_checked_is_an_error():
    with pytest.raises(UserError, match="no axis 'experts': use one of data, expert"):
        check_exchange(MESH, axis="experts")
    with pytest.raises(
        UserError, match="'ragged' does not exist on cpu: use 'two_hop' or 'gather'"
    ):
        check_exchange(MESH, backend="ragged")


PROCESS = """
    import sys, jax, jax.numpy as jnp
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    from moejax.errors import UserError
    from moejax.parallel import exchange
    from moejax.parallel.canary import check_exchange
    mesh = jax.make_mesh((4,), ("expert",), (jax.sharding.AxisType.Auto,))
    check_exchange(mesh)
    right = exchange.BACKENDS["two_hop"]

    def wrong_on_device_3(rows, traffic, **options):
        is_bad = jax.lax.axis_index("expert") == 3
        return [jnp.where(is_bad, -v, v) for v in right(rows, traffic, **options)]

    exchange.BACKENDS["two_hop"] = wrong_on_device_3
    try:
        check_exchange(mesh)
    except UserError as error:
        print("caught", error)
"""


@pytest.mark.long
def test_two_processes_come_to_the_same_verdict(tmp_path):
    """Also the one none of whose devices is wrong."""
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(PROCESS))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    start = lambda i: subprocess.Popen(
        [sys.executable, script, address, str(i)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    results = [process.communicate(timeout=120) for process in [start(0), start(1)]]
    for out, err in results:
        assert "caught exchange='two_hop' delivers" in out, err
