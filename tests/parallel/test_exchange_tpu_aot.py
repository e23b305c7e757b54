"""The ragged exchange passes the real TPU compiler for eight chips, without a TPU."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from moejax.parallel import canary
from moejax.parallel.exchange import exchange

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]

P, A, R, D = 8, 8192, 10240, 2880  # a layer of gpt-oss, with few tokens


@pytest.fixture(scope="module", params=["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def mesh(request):
    with pytest.MonkeyPatch.context() as patch:
        # Without these libtpu asks the network which TPU it is on, and refuses a second process.
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
        jax.config.update("jax_enable_compilation_cache", False)  # there is no client to read it
        yield jax.sharding.Mesh(topology.devices, ("expert",), axis_types=(AxisType.Auto,))
        jax.config.update("jax_enable_compilation_cache", True)


def compiled(mesh, f, *arguments):
    """`f` on the `arguments`, (shape of one device, dtype, whether every device has its own)."""
    own, same = Spec("expert"), Spec()
    specs = tuple(own if varies else same for *_, varies in arguments)
    structs = [
        jax.ShapeDtypeStruct(
            (shape[0] * (P if varies else 1), *shape[1:]), dtype,
            sharding=NamedSharding(mesh, own if varies else same),
        )
        for shape, dtype, varies in arguments
    ]  # fmt: skip
    run = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=own)
    return jax.jit(run).lower(*structs).compile()


def collectives(program):
    names = "ragged-all-to-all|all-to-all|all-gather|all-reduce|collective-permute"
    return re.findall(rf" ({names})(?:-start)?\(", program.as_text())


SIZES = ((P, P), jnp.int32, False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_one_ragged_collective_per_array_and_direction(mesh, dtype):
    def there_and_back(x, ids, sizes):
        send = functools.partial(exchange, sizes=sizes, axis="expert", num_rows=R)
        out, vjp = jax.vjp(send, x)
        return vjp(out)[0], send(ids)

    program = compiled(mesh, there_and_back, ((A, D), dtype, True), ((A,), jnp.int32, True), SIZES)
    assert collectives(program) == ["ragged-all-to-all"] * 3


def test_no_loop_over_layers_carries_the_room_for_rows(mesh):
    """Zeros made before the loop would be copied in each layer: the exchange writes into them."""

    def there_and_back(x, sizes):
        def layer(x, sizes):
            send = functools.partial(exchange, axis="expert")
            rows = send(x, sizes, num_rows=R)
            return x + send(jnp.tanh(rows), sizes.T, num_rows=A), None

        return jax.lax.scan(layer, x, sizes)[0]

    program = compiled(
        mesh, there_and_back, ((A, D), jnp.bfloat16, True), ((3, P, P), jnp.int32, False)
    )
    carried = re.findall(r"= \((.*?)\) while\(", program.as_text())
    assert any(f"[{A},{D}]" in state for state in carried)
    assert not [state for state in carried if f"[{R}," in state]


@pytest.mark.parametrize("backend, num", [("ragged", 8), ("two_hop", 12)])
def test_the_start_up_check_compiles(mesh, backend, num):
    program = canary._trial(mesh, "expert", backend).lower().compile()
    found = collectives(program)
    kind = "ragged-all-to-all" if backend == "ragged" else "all-to-all"
    assert found.count(kind) == num
    assert set(found) == {kind, "all-reduce"}
