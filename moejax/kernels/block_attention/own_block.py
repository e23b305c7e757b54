"""Attention of every query to the keys of its own block that are not after it.

A query meets only keys less than a block before it, so a tile of queries meets a window of keys,
masked by the number of the block. One tile at a time, so that only its scores exist.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from moejax.kernels import compat
from moejax.kernels.block_attention.attend import attend, attend_gradients
from moejax.kernels.block_attention.blocks import Blocks
from moejax.types import at_least_f32


def forward(
    q: Float[Array, "G S d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M dv"],
    blocks: Blocks,
    *,
    scale: float,
) -> tuple[Float[Array, "G S dv"], Float[Array, "G S"]]:
    """(result, log-sum-exp) of one key head in one row; 0 and -inf in padding."""
    windows = _Windows(q, blocks)

    def tile(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        i, q, own = part
        allowed = windows.allowed(i, own, q.shape[0])
        out, lse = attend(
            _rows(q), windows.of(k, i), windows.of(v, i), scale=scale, allowed=allowed
        )
        return out.reshape(*q.shape[:2], -1), lse.reshape(q.shape[:2])

    k, v = windows.near(k), windows.near(v)
    out, lse = lax.map(tile, (windows.index, windows.tiles(q), windows.own))
    return windows.joined(out), windows.joined(lse)


def backward(
    q: Float[Array, "G S d"],
    k: Float[Array, "M d"],
    v: Float[Array, "M dv"],
    d_out: Float[Array, "G S dv"],
    lse: Float[Array, "G S"],
    mean: Float[Array, "G S"],
    blocks: Blocks,
    *,
    scale: float,
) -> tuple[Float[Array, "G S d"], Float[Array, "M d"], Float[Array, "M dv"]]:
    """(dq, dk, dv) in at least float32; arguments as those of `attend_gradients`."""
    windows = _Windows(q, blocks)

    def tile(carry: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple, Array]:
        i, q, own, *of_queries = part
        allowed = windows.allowed(i, own, q.shape[0])
        d_q, *parts = attend_gradients(
            _rows(q),
            windows.of(k, i),
            windows.of(v, i),
            *map(_rows, of_queries),
            scale=scale,
            allowed=allowed,
        )
        carry = tuple(windows.add(x, part, i) for x, part in zip(carry, parts, strict=True))
        return carry, d_q.reshape(q.shape)

    num_keys, k, v = k.shape[0], windows.near(k), windows.near(v)
    zeros = tuple(compat.zeros(x.shape, at_least_f32(x.dtype), like=q) for x in (k, v))
    of_queries = (windows.tiles(x) for x in (q, d_out, lse, mean))
    q_tiles, *rest = of_queries
    (d_k, d_v), d_q = lax.scan(tile, zeros, (windows.index, q_tiles, windows.own, *rest))
    return windows.joined(d_q), windows.back(d_k, num_keys), windows.back(d_v, num_keys)


class _Windows:
    """Tile i of the queries and the window of keys that it meets."""

    def __init__(self, q: Array, blocks: Blocks):
        num_queries = q.shape[1]
        self.blocks, self.height, self.num_queries = blocks, blocks.tile, num_queries
        self.fill = -num_queries % self.height
        # Queries past the end are of no block, and neither are keys outside the row.
        own = jnp.pad(jnp.where(blocks.own < 0, -2, blocks.own), (0, self.fill), constant_values=-2)
        self.own = own.reshape(-1, self.height)
        self.index = jnp.arange(self.own.shape[0], dtype=jnp.int32)
        self.block_of_key = self._slice(self._padded(blocks.block_of_key, -1))

    def tiles(self, x: Array) -> Array:
        """`[G, S, ...]` as `[tiles, G, height, ...]`."""
        x = jnp.pad(x, [(0, self.fill if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, self.height, *x.shape[2:]), 1, 0)

    def joined(self, tiles: Array) -> Array:
        """The inverse of `tiles`."""
        x = jnp.moveaxis(tiles, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.num_queries]

    def near(self, keys: Array) -> Array:
        """The keys that some query may meet, from `reach` before the first; 0 outside the row."""
        return self._slice(self._padded(keys, 0))

    def back(self, near: Array, num_keys: int) -> Array:
        """What `near` took, in its place; 0 elsewhere."""
        keys = self._padded(compat.zeros((num_keys, near.shape[1]), near.dtype, like=near), 0)
        keys = lax.dynamic_update_slice_in_dim(keys, near, self.blocks.offset, 0)
        return keys[self.blocks.reach :][:num_keys]

    def of(self, near: Array, i: Array) -> Array:
        """The window of tile i."""
        length = self.blocks.reach + self.height
        return lax.dynamic_slice_in_dim(near, i * self.height, length, 0)

    def add(self, near: Array, part: Array, i: Array) -> Array:
        """`near` with `part` added in the window of tile i."""
        part = part + self.of(near, i)
        return lax.dynamic_update_slice_in_dim(near, part, i * self.height, 0)

    def allowed(self, i: Array, own: Array, group: int) -> Array:
        """`[G height, window]`: the same block, and not later."""
        block = self.of(self.block_of_key, i)
        query = jnp.arange(self.height)[:, None] + self.blocks.reach
        allowed = (own[:, None] == block) & (jnp.arange(block.size) <= query)
        return jnp.tile(allowed, (group, 1))

    def _padded(self, keys: Array, value: int) -> Array:
        fill = ((self.blocks.reach, self.fill), *((0, 0),) * (keys.ndim - 1))
        return jnp.pad(keys, fill, constant_values=value)

    def _slice(self, padded: Array) -> Array:
        length = self.blocks.reach + self.num_queries + self.fill
        return lax.dynamic_slice_in_dim(padded, self.blocks.offset, length, 0)


def _rows(x: Array) -> Array:
    """`[G, height, ...]` as one matrix."""
    return x.reshape(-1, *x.shape[2:])
