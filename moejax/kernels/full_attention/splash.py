"""Full attention by JAX's splash attention, a Pallas kernel for TPU that skips masked blocks.

It knows segments, windows, sinks and a soft cap; where the queries stand must be known before the
program runs. Checked in Pallas's interpreter and by the TPU compiler; not run on hardware.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moejax.kernels import compat
from moejax.kernels.full_attention.call import Call

LANES = 128  # every length is a multiple of it
MOST = 512  # queries and keys of a block


def obstacle(q: Array, k: Array, v: Array, call: Call) -> str | None:
    """Why it cannot serve such operands here, or None."""
    del v
    length, num_keys, dtype = q.shape[1], k.shape[1], jnp.dtype(q.dtype).name
    if compat.target_platform() != "tpu" and compat.interpretation() is None:
        return f"it runs on TPU, and this is {compat.target_platform()}"
    if dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, and these are {dtype}"
    if length % LANES or num_keys % LANES:
        return (
            f"numbers of queries and keys must be multiples of {LANES}, and these are {length} "
            f"and {num_keys}"
        )
    if call.static_offset is None:
        return "q_offset must be known before the program runs"
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1 and set(mesh.manual_axes) != set(mesh.axis_names):
        return "on several devices it must be called inside shard_map"
    if compat.varying_axes(q):
        return "it cannot be called inside a shard_map with check_vma=True"
    return None


def attention(q: Array, k: Array, v: Array, call: Call) -> Array:
    """`[B, S, H, Nv]`; arguments as of the public `full_attention`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, length, heads, _), num_keys = q.shape, k.shape[1]
    shape, offset = (length, num_keys), call.static_offset
    if call.window is None:
        mask = splash.CausalMask(shape, offset=offset)
    else:
        mask = splash.LocalMask(shape, window_size=(call.window - 1, 0), offset=offset)
    queries, keys = _block(length), _block(num_keys)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=call.soft_cap,
        # Pallas's plain interpreter: its simulator of a TPU does not take a kernel under `vmap`.
        interpret=compat.interpretation() is not None,
    )
    segments = None
    if call.segment_ids is not None:
        segments = splash.SegmentIds(call.query_segments(length), call.segment_ids)
    sinks = None if call.sinks is None else call.sinks.astype(jnp.float32)
    run = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segments, sinks))
    q, k, v = ((q * call.scale).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return run(q, k, v, segments).swapaxes(1, 2)


def _block(length: int) -> int:
    """The largest multiple of `LANES` up to `MOST` that divides `length`."""
    return max(b for b in range(LANES, MOST + 1, LANES) if length % b == 0)
