"""Times by hand: what a link carries, what a collective takes, what follows for a step."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.models.flops import size
from moejax.models.variables import parameters
from moejax.optim import freeze
from moejax.parallel.mesh import AXES
from moejax.parallel.placement import placed
from moejax.planning import network, roofline
from moejax.planning.chips import CHIPS
from moejax.planning.network import Link
from moejax.planning.topology import parse
from moejax.planning.work import SLICE, Exchange, Work
from moejax.types import named_leaves
from tests.parallel.test_placement import Device, sizes, torus
from tests.planning import planned


@dataclasses.dataclass(frozen=True)
class Arranged:
    """What `network.link` asks of a mesh."""

    devices: np.ndarray
    axis_names: tuple[str, ...] = AXES


@pytest.fixture(autouse=True)
def described(unchecked):
    """Devices are described here, and annotations ask for real ones."""


def link(axes, devices, topology, **split):
    return network.link(axes, Arranged(placed(devices, sizes(**split))), parse(topology))


V5P, V6E, H100 = CHIPS["v5p"], CHIPS["v6e"], CHIPS["h100"]


def test_one_axis_of_a_torus_has_its_two_links():
    found = link(("fsdp",), torus(4, 4, 8), "v5p:4x4x8", fsdp=8, expert=16)
    assert found.bandwidth == V5P.fast / 3
    assert found.spread == pytest.approx(8 / 4 / (V5P.fast / 3))
    assert found.hosts == 1


def test_two_axes_of_a_torus_work_at_once():
    found = link(("expert",), torus(4, 4, 8), "v5p:4x4x8", fsdp=8, expert=16)
    assert found.bandwidth == pytest.approx(V5P.fast * 2 / 3)
    assert found.spread == pytest.approx(4 / 4 / (V5P.fast / 3))


def test_a_line_has_no_way_round():
    devices = torus(4, 4, 1, device_kind="TPU v6 lite")
    found = link(("fsdp",), devices, "v6e:4x4", fsdp=16)
    assert found.bandwidth == V6E.fast / 2
    ring = torus(16, 16, 1, device_kind="TPU v6 lite")
    assert link(("fsdp",), ring, "v6e:16x16", fsdp=256).bandwidth == V6E.fast


def test_between_slices_is_slow():
    devices = [d for i in range(2) for d in torus(4, 4, 4, slice_index=i)]
    found = link((SLICE,), devices, "v5p:4x4x4*2", data=4, fsdp=32)
    assert (found.out, found.hosts, found.each) == (V5P.slow, 2, 1)
    call = Exchange("all-reduce", (SLICE,), 2, 800)
    assert network.seconds(call, found) == pytest.approx(2 * 800 / 2 / V5P.slow)
    assert link(("fsdp",), devices, "v5p:4x4x4*2", data=4, fsdp=32).hosts == 1
    inside = link(("data",), devices, "v5p:4x4x4*2", data=4, fsdp=32)  # two replicas in a slice
    assert inside.bandwidth == V5P.fast / 3 / 2
    assert inside.hosts == 1


def hosts_of_eight(count):
    return [Device(i, platform="gpu", process_index=i // 8) for i in range(8 * count)]


def test_between_hosts_of_graphics_cards_is_slow():
    cards = hosts_of_eight(4)
    within = link(("expert",), cards, "h100:4x8", fsdp=4, expert=8)
    assert (within.bandwidth, within.hosts, within.each) == (H100.fast, 1, 8)
    between = link(("fsdp",), cards, "h100:4x8", fsdp=4, expert=8)
    assert (between.out, between.hosts, between.each) == (H100.slow, 4, 1)


N = 64_000_000_000
THROUGH_CARDS = N * 7 / 8 / (8 * H100.slow)  # into a host that has an eighth, over eight cards


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", max(THROUGH_CARDS, N * 63 / 64 / H100.fast)),
        ("reduce-scatter", max(THROUGH_CARDS, N * 63 / 64 / H100.fast)),
        ("all-reduce", 2 * max(THROUGH_CARDS, N * 63 / 64 / H100.fast)),
        ("all-to-all", N * 7 / 8 / H100.slow),  # every card sends seven eighths of its own
        ("collective-permute", N / H100.slow),
    ],
)
def test_a_group_leaves_its_hosts_through_all_of_their_cards(kind, expected):
    both = link(("fsdp", "expert"), hosts_of_eight(8), "h100:8x8", fsdp=8, expert=8)
    call = Exchange(kind, ("fsdp", "expert"), 64, N)
    assert network.seconds(call, both) == pytest.approx(expected)
    one_card = link(("fsdp",), hosts_of_eight(8), "h100:8x8", fsdp=8, expert=8)
    call = Exchange("all-gather", ("fsdp",), 8, N)
    assert network.seconds(call, one_card) == pytest.approx(N * 7 / 8 / H100.slow)


def test_within_two_hosts_the_switches_are_slower_than_the_cards():
    experts = link(("expert",), hosts_of_eight(4), "h100:4x8", fsdp=2, expert=16)
    gather = Exchange("all-gather", ("expert",), 16, N)
    assert network.seconds(gather, experts) == pytest.approx(N * 15 / 16 / H100.fast)
    rows = gather._replace(kind="all-to-all")
    assert network.seconds(rows, experts) == pytest.approx(N / 2 / H100.slow)


JOINED = Link(bandwidth=100.0, spread=0.05)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-gather", 800 * 3 / 4 / 100),
        ("reduce-scatter", 800 * 3 / 4 / 100),
        ("all-reduce", 2 * 800 * 3 / 4 / 100),
        ("collective-permute", 800 / 100),
        ("all-to-all", 800 * 0.05),  # further than the links alone say
        ("ragged-all-to-all", 800 * 0.05),
    ],
)
def test_seconds_of_a_call(kind, expected):
    call = Exchange(kind, ("fsdp",), 4, 800)
    assert network.seconds(call, JOINED) == pytest.approx(expected)
    assert network.seconds(call._replace(size=1), JOINED) == 0


def test_rows_through_a_switch_need_no_hops():
    call = Exchange("all-to-all", ("expert",), 4, 800)
    assert network.seconds(call, dataclasses.replace(JOINED, spread=0)) == pytest.approx(6)


@pytest.mark.parametrize(
    ("overrides", "extra"),
    [
        ((), 0),
        (("num_microbatches=2",), 1),  # two-pass balancing needs the loads first
        (('model.remat="full"',), 1),
        (('model.remat="dots"',), 0),
        (('model.remat="full"', "num_microbatches=2"), 2),
    ],
)
def test_passes_that_are_done_again(overrides, extra):
    experiment = planned.experiment(planned.SMOKE[0], *overrides)
    assert roofline.extra_passes(experiment, experiment.build_model(100)) == extra


@pytest.mark.slow
def test_a_step_takes_its_slowest_resource_or_all_networks_besides():
    experiment, _, step, _ = planned.compiled()
    work = planned.plan().work
    topology = parse("h100:1x8")
    flops = roofline.flops_of(experiment, step.model, work, 8)
    cards = np.array([Device(i, platform="gpu") for i in range(8)]).reshape(step.mesh.devices.shape)
    described = dataclasses.replace(step, mesh=Arranged(cards))
    found = roofline.estimate(described, topology, work, flops)
    assert found.compute == pytest.approx(flops.executed / H100.flops)
    assert found.memory == pytest.approx(work.traffic / H100.bandwidth)
    by_hand = sum(
        network.seconds(e, Link(bandwidth=H100.fast, spread=0)) * n
        for e, n in work.exchanges.items()
    )
    assert sum(found.networks.values()) == pytest.approx(by_hand)
    assert found.least == max(found.compute, found.memory, *found.networks.values())
    assert found.most == pytest.approx(max(found.compute, found.memory) + by_hand)
    assert found.mfu_least == pytest.approx(flops.model / H100.flops / found.most)


@pytest.mark.slow
def test_model_flops_are_those_of_the_count():
    experiment, _, step, _ = planned.compiled()
    flops = planned.plan().flops
    counted = size(step.model, 64).train_flops_per_token * 8 * 64 / jax.device_count()
    assert flops.model == counted
    assert flops.executed >= flops.model


def flops_with(num_draws):
    words = (f"objective.num_draws={num_draws}",)
    experiment = planned.experiment("configs/mixture_of_lora.py:smoke_remix", *words)
    model = experiment.build_model(100)
    return roofline.flops_of(experiment, model, Work(), 1), experiment, model


def test_every_draw_is_computed():
    (two, experiment, model), (four, *_) = flops_with(2), flops_with(4)
    assert (four.model, four.executed) == (2 * two.model, 2 * two.executed)
    frozen = named_leaves(freeze.split(parameters(shapes_of(model)), experiment.trainable)[1])
    once = size(model, experiment.sequence_length, frozen=frozen)
    assert experiment.size(model).train_flops_per_token == 2 * once.train_flops_per_token
    assert experiment.size(model).params == once.params


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))
