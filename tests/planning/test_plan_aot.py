"""Smoke configs planned for every TPU generation, by the real compiler and without a TPU."""

import importlib.util

import pytest

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.planning.plan import plan
from moejax.planning.topology import parse
from moejax.planning.work import SLICE
from tests.planning import planned

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]
OVERRIDES = ("mesh.data=null", "mesh.expert=2", "mesh.fsdp=2", "batch_size=8", "num_microbatches=1")


def planned_for(topology, *overrides, config="configs/olmoe_1b_7b.py:smoke"):
    return plan(planned.experiment(config, *OVERRIDES, *overrides), parse(topology))


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_generation(topology):
    found = planned_for(topology)
    assert found.memory.fits
    assert found.memory.temporaries > 0
    assert not found.expansions
    # What only TPUs have: rows travel by the collective for uneven ones.
    kinds = {(call.kind, call.axes) for call in found.work.exchanges}
    assert ("ragged-all-to-all", ("expert",)) in kinds
    assert found.work.flops > 0
    assert found.estimate.least > 0
    assert set(found.estimate.networks) >= {("expert",), ("fsdp",)}


def test_several_slices_exchange_gradients_alone():
    found = planned_for("v5p:2x2x1*2", "mesh.data=2")
    across = {call.kind for call in found.work.exchanges if call.axes == (SLICE,)}
    assert across
    assert across <= {"all-reduce", "reduce-scatter", "all-gather"}
    inside = {axis for call in found.work.exchanges for axis in call.axes} - {SLICE}
    assert inside == {"fsdp", "expert"}
    assert found.estimate.networks[(SLICE,)] > 0


def test_a_model_axis_over_slices_is_refused():
    with pytest.raises(UserError, match=r"take 8 devices and must lie within a slice of 4"):
        planned_for("v5p:2x2x1*2", "mesh.fsdp=4")


def test_what_is_too_large_is_refused_with_advice():
    large = ("model.d_model=8192", "model.block.ffn.experts.d_ff=65536")
    found = planned_for("v5e:2x2", *large)
    assert found.refusal is not None
    assert not found.memory.fits
    assert found.memory.needed > found.memory.capacity
    assert found.advice


def test_kernels_are_those_of_the_target():
    """Not those of this machine's CPU: XLA's grouped products on a v5p, where it has them."""
    found = planned_for("v5p:2x2x1")
    grouped = found.work.kernels["tpu_custom_call"]
    topology = parse("v5p:2x2x1")
    kind = topology.devices()[0].device_kind
    has = kind in compat._RAGGED_DOT_KINDS and compat._libtpu_version() >= compat._RAGGED_DOT_SINCE
    assert bool(grouped) == has
