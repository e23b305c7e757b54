"""Block attention by online softmax over all blocks before a query, masked to what it chose.

Costs what full causal attention costs, whatever is chosen, and needs neither sort nor gather: for
sequences of a few blocks. Memory is linear in the keys: a chunk of queries meets a block at a time,
and the backward pass computes the scores again. (Dao et al., arXiv 2205.14135.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from moejax.kernels import compat
from moejax.kernels.block_attention import own_block
from moejax.kernels.block_attention.attend import attend, attend_gradients, merge
from moejax.kernels.block_attention.blocks import Blocks
from moejax.kernels.block_attention.heads import by_head
from moejax.types import at_least_f32

_CHUNK = 512  # query rows, of all heads that share a key


def obstacle(dtype: Any, block_size: int) -> str | None:
    """None: serves every dtype and block size on every platform."""


def plan(targets: Int[Array, "B Hkv Gs S K"] | None, blocks: Blocks, q: Array) -> Array | None:
    """The choices as they are; None is every target before a query."""
    del blocks, q
    return targets


def forward(
    q: Float[Array, "B Hkv G S d"],
    k: Float[Array, "B Hkv M d"],
    v: Float[Array, "B Hkv M dv"],
    targets: Int[Array, "B Hkv Gs S K"] | None,
    blocks: Blocks,
    *,
    scale: float,
) -> tuple[Float[Array, "B Hkv G S dv"], Float[Array, "B Hkv G S"]]:
    """(result, log-sum-exp), in at least float32; 0 and -inf in padding."""

    def of_head(arrays: tuple, blocks: Blocks) -> tuple[Array, Array]:
        q, k, v, targets = arrays
        own = own_block.forward(q, k, v, blocks, scale=scale)
        if _nothing(targets, blocks):
            return own
        keys, values = blocks.of_keys(k), blocks.of_keys(v)

        def of_chunk(part: tuple) -> tuple[Array, Array]:
            choices, (q, out, lse) = part

            def add(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                allowed = choices.of(j, q.shape[0])
                rows = attend(_rows(q), keys[j], values[j], scale=scale, allowed=allowed)
                return merge(*carry, *rows)

            start = _rows(out), _rows(lse)
            rows, lse_rows = lax.fori_loop(*choices.bounds(), add, start)
            return rows.reshape(out.shape), lse_rows.reshape(lse.shape)

        cut = _Cut(q)
        parts = _choices(cut, targets, blocks), tuple(cut.chunks(x) for x in (q, *own))
        return tuple(cut.joined(x) for x in lax.map(of_chunk, parts))

    return by_head(of_head, (q, k, v, targets), blocks)


def backward(
    q: Float[Array, "B Hkv G S d"],
    k: Float[Array, "B Hkv M d"],
    v: Float[Array, "B Hkv M dv"],
    out: Float[Array, "B Hkv G S dv"],
    lse: Float[Array, "B Hkv G S"],
    d_out: Float[Array, "B Hkv G S dv"],
    targets: Int[Array, "B Hkv Gs S K"] | None,
    blocks: Blocks,
    *,
    scale: float,
) -> tuple[Float[Array, "B Hkv G S d"], Float[Array, "B Hkv M d"], Float[Array, "B Hkv M dv"]]:
    """(dq, dk, dv) for the cotangent of the result."""

    def of_head(arrays: tuple, blocks: Blocks) -> tuple[Array, ...]:
        q, k, v, out, lse, d_out, targets = arrays
        mean = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1)
        d_q, d_k, d_v = own_block.backward(q, k, v, d_out, lse, mean, blocks, scale=scale)
        if not _nothing(targets, blocks):
            of_queries = q, d_out, lse, mean, d_q
            d_q, d_keys, d_values = _routed(of_queries, k, v, targets, blocks, scale)
            d_k, d_v = d_k + blocks.to_keys(d_keys), d_v + blocks.to_keys(d_values)
        return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

    return by_head(of_head, (q, k, v, out, lse, d_out, targets), blocks)


def _routed(of_queries, k, v, targets, blocks, scale) -> tuple[Array, Array, Array]:
    """The gradients by blocks, added to those of the queries; by target for keys and values."""
    keys, values = blocks.of_keys(k), blocks.of_keys(v)

    def of_chunk(carry: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Array]:
        choices, (q, d_out, lse, mean, d_q) = part

        def add(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            d_q, d_keys, d_values = carry
            part, *rest = attend_gradients(
                _rows(q),
                keys[j],
                values[j],
                *map(_rows, (d_out, lse, mean)),
                scale=scale,
                allowed=choices.of(j, q.shape[0]),
            )
            d_keys, d_values = (
                lax.dynamic_update_index_in_dim(x, x[j] + more, j, 0)
                for x, more in zip((d_keys, d_values), rest, strict=True)
            )
            return d_q + part, d_keys, d_values

        rows, *carry = lax.fori_loop(*choices.bounds(), add, (_rows(d_q), *carry))
        return tuple(carry), rows.reshape(d_q.shape)

    cut = _Cut(of_queries[0])
    parts = _choices(cut, targets, blocks), tuple(cut.chunks(x) for x in of_queries)
    zeros = tuple(compat.zeros(x.shape, at_least_f32(x.dtype), like=k) for x in (keys, values))
    (d_keys, d_values), d_q = lax.scan(of_chunk, zeros, parts)
    return cut.joined(d_q), d_keys, d_values


class _Choices(NamedTuple):
    """What a chunk of C queries may choose, and what it chose (None: everything it may)."""

    first: Int[Array, " C"]
    end: Int[Array, " C"]
    targets: Int[Array, "Gs C K"] | None

    def bounds(self) -> tuple[Array, Array]:
        """The targets that some query of the chunk may choose."""
        return jnp.min(self.first), jnp.max(self.end)

    def of(self, j: Array, group: int) -> Array:
        """`[G C, 1]`: who attends target j."""
        if self.targets is None:
            allowed = ((self.first <= j) & (j < self.end))[None]
        else:
            allowed = jnp.any(self.targets == j, axis=-1)
        return jnp.broadcast_to(allowed, (group, allowed.shape[1])).reshape(-1, 1)


class _Cut:
    """Cuts `[G, S, ...]` into chunks of queries, `[chunks, G, C, ...]`."""

    def __init__(self, q: Array):
        self.num_queries = q.shape[1]
        self.size = min(q.shape[1], max(1, _CHUNK // q.shape[0]))

    def chunks(self, x: Array, value: int = 0) -> Array:
        fill = [(0, -self.num_queries % self.size if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, fill, constant_values=value)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, self.size, *x.shape[2:]), 1, 0)

    def joined(self, chunks: Array) -> Array:
        x = jnp.moveaxis(chunks, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.num_queries]


def _nothing(targets: Array | None, blocks: Blocks) -> bool:
    """Whether there is only the own block."""
    return not blocks.num_targets or (targets is not None and not targets.shape[-1])


def _choices(cut: _Cut, targets: Array | None, blocks: Blocks) -> _Choices:
    """Those of all chunks; queries that fill the last one up have none."""
    none = blocks.num_targets
    return _Choices(
        first=cut.chunks(blocks.first_target[None], none)[:, 0],
        end=cut.chunks(blocks.end_target[None])[:, 0],
        targets=None if targets is None else cut.chunks(targets, none),
    )


def _rows(x: Array) -> Array:
    """`[G, C, ...]` as one matrix."""
    return x.reshape(-1, *x.shape[2:])
