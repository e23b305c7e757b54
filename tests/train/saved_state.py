"""A state with every kind of leaf, and checkpoints of it, for the checkpoint tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.train.checkpoint import Checkpointer
from moejax.train.fingerprint import fingerprints
from moejax.train.retention import Keep


class Moments(NamedTuple):
    mu: dict
    count: jax.Array


def sharding(*spec, devices=8, shape=(4, 2)):
    mesh = jax.make_mesh(
        shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


def make_state(seed=0, spread=True):
    """Every kind of leaf; 512 kB in the largest, so that it is not stored inside an index."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((512, 256)), jnp.float32)
    state = {
        "params": {"w": w, "scale": jnp.asarray(rng.standard_normal(8), jnp.bfloat16)},
        "moments": Moments({"w": w * 2, "none": None}, jnp.int32(seed)),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed), 4),
        "mask": jnp.arange(5) % 2 == 0,
        "bytes": jnp.arange(5, dtype=jnp.uint8),
        "half": jnp.asarray([1.0, np.inf, np.nan], jnp.float16),
        "empty": jnp.zeros((0, 3)),
    }
    if not spread:
        return jax.device_put(state, jax.devices()[0])
    state = jax.device_put(state, sharding())
    state["params"]["w"] = jax.device_put(w, sharding("a", "b"))
    state["keys"] = jax.device_put(state["keys"], sharding("a"))
    return state


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save_steps(directory, steps, keep=None):
    with Checkpointer(directory, keep or Keep(last=None)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"position": step})


def restored_step(directory):
    with Checkpointer(directory) as checkpointer:
        state, extra, step = checkpointer.restore(abstract(make_state()))
        assert fingerprints(state) == fingerprints(make_state(step))
        assert extra == {"position": step}
        return step, checkpointer.problems
