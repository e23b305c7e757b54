"""Packed queries against the blocks they chose, tile by tile: all that a backend must supply.

Every key of a target is visible to every query that chose it, so nothing is masked. Rows, scores
and their gradients exist for one tile only; the gradients of keys are added up tile by tile in a
fixed order.
"""

from __future__ import annotations

from jax import Array
from jaxtyping import Float

from moejax.kernels import compat
from moejax.kernels.block_attention.attend import attend, attend_gradients
from moejax.kernels.expert_mlp.slots import Slots
from moejax.kernels.tiles import Tile, plan_tiles, scan_tiles
from moejax.types import at_least_f32


def forward(
    q: Float[Array, "T d"],
    k: Float[Array, "J b d"],
    v: Float[Array, "J b dv"],
    slots: Slots,
    *,
    scale: float,
) -> tuple[Float[Array, "R dv"], Float[Array, " R"]]:
    """(result, log-sum-exp) of each row over its block; unspecified, finite, in empty slots."""
    token, num_rows = slots.token(), slots.order.size

    def body(tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, lse = attend(tile.gather(q, token), k[tile.group], v[tile.group], scale=scale)
        return tile.store(carry[0], rows), tile.store(carry[1], lse)

    out = compat.zeros((num_rows, v.shape[2]), v.dtype, like=q)
    lse = compat.zeros((num_rows,), at_least_f32(q.dtype), like=q)
    return scan_tiles(plan_tiles(slots.group_sizes, num_rows), body, (out, lse))


def backward(
    q: Float[Array, "T d"],
    k: Float[Array, "J b d"],
    v: Float[Array, "J b dv"],
    d_out: Float[Array, "T dv"],
    lse: Float[Array, " T"],
    mean: Float[Array, " T"],
    slots: Slots,
    *,
    scale: float,
) -> tuple[Float[Array, "R d"], Float[Array, "J b d"], Float[Array, "J b dv"]]:
    """(dq by row, dk, dv), the last two in at least float32.

    Args:
      q, k, v, slots, scale: as for `forward`.
      d_out: the cotangent of the result over all keys.
      lse: the log-sum-exp over all keys, those of other blocks included.
      mean: the sum over the width of `d_out` times that result.
    """
    token, num_rows = slots.token(), slots.order.size

    def body(tile: Tile, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        of_queries = (tile.gather(x, token) for x in (d_out, lse, mean))
        d_rows, d_keys, d_values = attend_gradients(
            tile.gather(q, token), k[tile.group], v[tile.group], *of_queries, scale=scale
        )
        d_q, d_k, d_v = carry
        d_q = tile.store(d_q, d_rows)
        return d_q, tile.add_to_group(d_k, d_keys), tile.add_to_group(d_v, d_values)

    d_q = compat.zeros((num_rows, q.shape[1]), q.dtype, like=q)
    d_k, d_v = (compat.zeros(x.shape, at_least_f32(x.dtype), like=q) for x in (k, v))
    return scan_tiles(plan_tiles(slots.group_sizes, num_rows), body, (d_q, d_k, d_v))
