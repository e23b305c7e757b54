"""How attention's queries meet keys of the same row that lie on other devices.

The mesh axis `context` splits sequences. A *way* of this module is called as

    way(attend, q, k, v, segment_ids, *per_head)

and calls `attend(q, k, v, segment_ids, q_offset, *per_head)` on every device, with whole rows of
keys, so that a method knows nothing of devices: query i of the call stands at `q_offset + i`. The
batch and the heads stay split as they are, and `per_head` (arrays `[H, ...]`, sinks say) are split
with the heads. Ulysses: Jacobs et al., arXiv 2309.14509.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import ArrayLike, Float, Int

from moejax.errors import UserError
from moejax.parallel.gather import gathered
from moejax.parallel.sharding import RULES, is_split, split_ways
from moejax.types import at_least_f32

Attend = Callable[..., Array]  # (q, k, v, segment_ids, q_offset, *per_head) -> [B, S, H, Nv]
(_CONTEXT,) = RULES["sequence"]


class Way(Protocol):
    """What `Ulysses`, `GatheredKeys` and `FewestBytes` are."""

    def __call__(
        self, attend: Attend, q: Array, k: Array, v: Array, segment_ids: Any, *per_head: Array
    ) -> Array: ...


def without_devices(
    attend: Attend, q: Array, k: Array, v: Array, segment_ids: Any, *per_head: Array
) -> Array:
    """The way of a row that lies whole where it is used, of any length."""
    return attend(q, k, v, segment_ids, 0, *per_head)


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """Every device exchanges its part of all heads' rows for whole rows of a part of the heads.

    Every device then does the same work, whatever rows look like. The query heads on a device must
    divide by `mesh.context`; heads of keys that do not are repeated until they do.
    """

    def __call__(
        self,
        attend: Attend,
        q: Float[Array, "B S H N"],
        k: Float[Array, "B S Hkv N"],
        v: Float[Array, "B S Hkv Nv"],
        segment_ids: Int[ArrayLike, "B S"],
        *per_head: Array,
    ) -> Float[Array, "B S H Nv"]:
        if not is_split():
            return attend(q, k, v, segment_ids, 0, *per_head)
        if not _heads_divide(q):
            tensor = split_ways("heads")
            raise UserError(
                f"Ulysses splits heads, and attention has {q.shape[2]}: mesh.context="
                f"{split_ways('sequence')} (times mesh.tensor={tensor}, if that divides them) must "
                "divide them; change the mesh, or set attention.context_parallel to GatheredKeys()"
            )
        k, v = _repeated(k, q, _head_ways(q)), _repeated(v, q, _head_ways(q))
        body = functools.partial(_attend_heads, attend)
        return _on_row_shards(body, q, k, v, segment_ids, per_head, split=(_CONTEXT,))


@dataclasses.dataclass(frozen=True)
class GatheredKeys:
    """Every device gathers the keys and values of whole rows, and keeps its own queries.

    It serves any number of heads. The last device's queries see the most keys: with long causal
    rows it works nearly twice as long as the mean. Gradients of keys return to where these came
    from, and are added there in at least float32.
    """

    def __call__(
        self,
        attend: Attend,
        q: Float[Array, "B S H N"],
        k: Float[Array, "B S Hkv N"],
        v: Float[Array, "B S Hkv Nv"],
        segment_ids: Int[ArrayLike, "B S"],
        *per_head: Array,
    ) -> Float[Array, "B S H Nv"]:
        if not is_split():
            return attend(q, k, v, segment_ids, 0, *per_head)
        ways = _tensor_ways(q)
        k, v = _repeated(k, q, ways), _repeated(v, q, ways)
        body = functools.partial(_attend_queries, attend)
        return _on_row_shards(body, q, k, v, segment_ids, per_head, split=())


@dataclasses.dataclass(frozen=True)
class FewestBytes:
    """`Ulysses` where it can serve and moves no more bytes than `GatheredKeys`, which it is else.

    With G = H / Hkv query heads on a head of keys and P devices, Ulysses moves (G + 1) / P of what
    gathering moves forward: it is for many devices or few queries per key. Gradients count too, of
    keys in at least float32.
    """

    def __call__(
        self,
        attend: Attend,
        q: Float[Array, "B S H N"],
        k: Float[Array, "B S Hkv N"],
        v: Float[Array, "B S Hkv Nv"],
        segment_ids: Int[ArrayLike, "B S"],
        *per_head: Array,
    ) -> Float[Array, "B S H Nv"]:
        way = self.of(q, k, v) if is_split() else GatheredKeys()
        return way(attend, q, k, v, segment_ids, *per_head)

    def of(self, q: Any, k: Any, v: Any) -> Ulysses | GatheredKeys:
        """Which of the two it is for these under the mesh in use; as many bytes are for Ulysses."""
        if _heads_divide(q) and bytes_of_ulysses(q, k, v) <= bytes_of_gather(q, k, v):
            return Ulysses()
        return GatheredKeys()


def bytes_of_ulysses(q: Any, k: Any, v: Any) -> int:
    """What all devices of a row together receive, forward and backward."""
    parts, repeats = split_ways("sequence"), _repeats(k, q, _head_ways(q))
    result = q.size // q.shape[-1] * v.shape[-1]
    moved = q.size + result + repeats * (k.size + v.size)
    return 2 * moved * k.dtype.itemsize * (parts - 1) // parts


def bytes_of_gather(q: Any, k: Any, v: Any) -> int:
    """What all devices of a row together receive, forward and backward."""
    moved = _repeats(k, q, _tensor_ways(q)) * (k.size + v.size)
    both = k.dtype.itemsize + jnp.dtype(at_least_f32(k.dtype)).itemsize
    return moved * both * (split_ways("sequence") - 1)


def _attend_heads(attend: Attend, q: Array, k: Array, v: Array, ids: Array, *per_head: Array):
    """On a device, which has 1 / P of the positions and has to get 1 / P of its heads."""
    parts = lax.axis_size(_CONTEXT)
    if parts == 1:
        return attend(q, k, v, ids, 0, *per_head)
    # One exchange for all three: `[B, S / P, P, what goes to a device]`.
    by_device = [x.reshape(*x.shape[:2], parts, -1) for x in (q, k, v)]
    ends = [sum(x.shape[-1] for x in by_device[: n + 1]) for n in range(2)]
    whole = lax.all_to_all(
        jnp.concatenate(by_device, -1), _CONTEXT, split_axis=2, concat_axis=1, tiled=True
    )
    whole = jnp.split(whole, ends, axis=-1)
    rows = [
        x.reshape(*x.shape[:2], -1, like.shape[-1])
        for x, like in zip(whole, (q, k, v), strict=True)
    ]
    out = attend(*rows, ids, 0, *per_head)
    return lax.all_to_all(out, _CONTEXT, split_axis=1, concat_axis=2, tiled=True)


def _attend_queries(attend: Attend, q: Array, k: Array, v: Array, ids: Array, *per_head: Array):
    """On a device, which has 1 / P of the positions."""
    if lax.axis_size(_CONTEXT) == 1:
        return attend(q, k, v, ids, 0, *per_head)
    whole = gathered(jnp.concatenate([k, v], axis=-1), _CONTEXT, 1)
    k, v = jnp.split(whole, [k.shape[-1]], axis=-1)
    return attend(q, k, v, ids, lax.axis_index(_CONTEXT) * q.shape[1], *per_head)


def _on_row_shards(
    body: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Any,
    per_head: tuple[Array, ...],
    *,
    split: tuple[str, ...],
) -> Array:
    """`body(q, k, v, segment_ids, *per_head)` on every device; segment ids are of whole rows.

    `split` are the mesh axes that split `per_head` beside those that split heads.

    What varies over which axis is not checked (`check_vma`): kernels that are not moejax's own do
    not say it.
    """
    parts = split_ways("sequence")
    if q.shape[1] % parts:
        raise UserError(
            f"a sequence of {q.shape[1]} positions cannot be split {parts} ways (mesh.context="
            f"{parts}): make its length a multiple of {parts}, or the mesh smaller"
        )
    # What does not divide lies whole on every device of the axis, which all compute the same.
    batch = RULES["batch"] if q.shape[0] % split_ways("batch") == 0 else None
    heads = RULES["heads"] if _tensor_ways(q) > 1 else ()
    rows = PartitionSpec(batch, _CONTEXT, heads or None, None)
    of_heads = PartitionSpec((*heads, *split) or None)
    run = jax.shard_map(
        body,
        in_specs=(rows, rows, rows, PartitionSpec(batch, None), *(of_heads for _ in per_head)),
        out_specs=rows,
        check_vma=False,
    )
    return run(q, k, v, jnp.asarray(segment_ids), *per_head)


def _tensor_ways(q: Any) -> int:
    """Into how many parts `mesh.tensor` splits the heads: one where it does not divide them."""
    ways = split_ways("heads")
    return ways if q.shape[2] % ways == 0 else 1


def _head_ways(q: Any) -> int:
    """Into how many parts Ulysses splits the heads, those of `mesh.tensor` among them."""
    return _tensor_ways(q) * split_ways("sequence")


def _heads_divide(q: Any) -> bool:
    return q.shape[2] % _head_ways(q) == 0


def _repeats(k: Any, q: Any, ways: int) -> int:
    """How often each head of keys stands so that `ways` divides them, each beside its queries."""
    repeats = ways // math.gcd(k.shape[2], ways)
    assert q.shape[2] % (k.shape[2] * repeats) == 0, "ways divides the heads of queries"
    return repeats


def _repeated(k: Array, q: Array, ways: int) -> Array:
    repeats = _repeats(k, q, ways)
    return k if repeats == 1 else jnp.repeat(k, repeats, axis=2)
