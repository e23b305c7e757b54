"""What a plan reads from programs that XLA really compiles, on eight simulated devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.parallel.mesh import Mesh
from moejax.planning import hlo
from moejax.planning.work import Exchange, work_of

LENGTH, WIDTH = 5, 32


@pytest.fixture
def mesh():
    return Mesh(data=2, fsdp=4).build()


def work(mesh, function, *shapes, out=()):
    """Of a function of float32 arrays, each a shape and the mesh axes of its first axis."""
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, axes in shapes
    ]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(*out))).lower(
            *given
        )
        return work_of(hlo.read(compiled.compile().as_text()), dict(mesh.shape))


def per_device(mesh, body, axes):
    return jax.shard_map(
        body, mesh=mesh, in_specs=PartitionSpec(axes), out_specs=PartitionSpec(axes)
    )


def test_collectives_of_a_scan_count_once_for_each_turn(mesh):
    def layers(x):
        add = lambda x, _: (jax.lax.psum(x, "fsdp") * 0.5, None)
        return jax.lax.scan(add, jax.lax.pcast(x, (), to="varying"), None, length=LENGTH)[0]

    body = lambda x: layers(x) * 1.0
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    found = work(mesh, mapped, ((8, WIDTH), ("data",)), out=("data",))
    assert dict(found.exchanges) == {Exchange("all-reduce", ("fsdp",), 4, 4 * WIDTH * 4): LENGTH}
    assert found.open_loops == 0


def test_gathered_weights_and_their_bytes(mesh):
    """The product of whole tokens with split weights needs the weights, or sums what comes out."""
    found = work(
        mesh,
        lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec())) * 2,
        ((WIDTH, WIDTH), ("fsdp",)),
    )
    (exchange, count), *others = found.exchanges.items()
    assert not others
    assert count == 1
    assert exchange.num_bytes == WIDTH * WIDTH * 4
    assert (exchange.kind, exchange.axes, exchange.size) == ("all-gather", ("fsdp",), 4)


def test_a_gather_reads_its_part_and_writes_the_whole(mesh):
    found = work(mesh, lambda w: w, ((WIDTH, WIDTH), ("fsdp",)))
    assert [call.kind for call in found.exchanges] == ["all-gather"]
    assert found.traffic == WIDTH * WIDTH * 4 * (1 + 1 / 4)


def test_rows_for_everybody(mesh):
    body = lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
    found = work(
        mesh,
        per_device(mesh, body, ("data", "fsdp")),
        ((64, WIDTH), (("data", "fsdp"),)),
        out=(("data", "fsdp"),),
    )
    assert dict(found.exchanges) == {Exchange("all-to-all", ("fsdp",), 4, 8 * WIDTH * 4): 1}


def test_neighbours(mesh):
    ring = [(i, (i + 1) % 4) for i in range(4)]
    body = lambda x: jax.lax.ppermute(x, "fsdp", ring)
    found = work(
        mesh,
        per_device(mesh, body, ("data", "fsdp")),
        ((64, WIDTH), (("data", "fsdp"),)),
        out=(("data", "fsdp"),),
    )
    assert [(e.kind, e.axes, e.num_bytes) for e in found.exchanges] == [
        ("collective-permute", ("fsdp",), 8 * WIDTH * 4)
    ]


def test_products_of_a_scan(mesh):
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = work(
        mesh,
        layers,
        ((16, WIDTH), (("data", "fsdp"),)),
        ((LENGTH, WIDTH, WIDTH), ()),
        out=(("data", "fsdp"),),
    )
    assert found.flops == LENGTH * 2 * 2 * WIDTH * WIDTH  # two rows on each device
    assert not found.exchanges


def test_a_loop_of_open_length_says_so(mesh):
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x @ x, x)

    found = work(mesh, until, ((WIDTH, WIDTH), ()))
    assert found.open_loops >= 1
    assert found.flops == 0


def test_traffic_of_one_pass_over_memory(mesh):
    found = work(
        mesh, lambda x: x * 2 + 1, ((1024, WIDTH), (("data", "fsdp"),)), out=(("data", "fsdp"),)
    )
    assert found.traffic == pytest.approx(2 * 128 * WIDTH * 4, rel=0.01)


@pytest.mark.parametrize("most_first", [False, True])
def test_of_branches_with_equal_collectives_the_one_with_most_products(mesh, most_first):
    def either(x):
        branches = [lambda x: x + 1, lambda x: x @ x]
        return jax.lax.switch((x.sum() > 3).astype(int), branches[:: -1 if most_first else 1], x)

    found = work(mesh, either, ((WIDTH, WIDTH), ()))
    assert found.flops == 2 * WIDTH**3
    assert found.tied == 1


def test_equal_branches_are_no_choice(mesh):
    def either(x):
        return jax.lax.cond(x.sum() > 3, lambda x: x @ x, lambda x: (x + 1) @ x, x)

    assert work(mesh, either, ((WIDTH, WIDTH), ())).tied == 0
