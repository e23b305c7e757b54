"""Full attention by cuDNN, through `jax.nn.dot_product_attention`, on NVIDIA GPUs.

It serves whole rows of one segment. Packed rows, sinks and a soft cap it cannot serve: `jax.nn`
knows no segments but as a dense mask, and the sums of exponents that it can return have no gradient
there, so results could be rescaled for sinks and gradients could not.

What it is lowered to was looked at; not run on hardware.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moejax.kernels import compat
from moejax.kernels.full_attention.call import Call

MOST_WIDTH = 128  # of a head; cuDNN takes 256 from Hopper on


def obstacle(q: Array, k: Array, v: Array, call: Call) -> str | None:
    """Why it cannot serve such operands here, or None."""
    width, dtype = q.shape[-1], jnp.dtype(q.dtype).name
    if compat.target_platform() != "gpu":
        return f"it runs on NVIDIA GPUs, and this is {compat.target_platform()}"
    if not compat.has_cudnn():
        return "this jax has no cuDNN: install jax[cuda13]"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, and these are {dtype}"
    if width != v.shape[-1]:
        return f"keys and values must be of one width, and these are of {width} and {v.shape[-1]}"
    if width % 8 or width > MOST_WIDTH:
        return f"a head's width must be a multiple of 8 up to {MOST_WIDTH}, and this is {width}"
    if call.segment_ids is not None:
        return "it knows no packed rows and no padding (segment_ids)"
    if call.static_offset != 0 or q.shape[1] != k.shape[1]:
        return "there must be one query for each key (q_offset=0)"
    if call.sinks is not None:
        return "it has no sinks"
    if call.soft_cap is not None:
        return "it has no soft_cap"
    return None


def attention(q: Array, k: Array, v: Array, call: Call) -> Array:
    """`[B, S, H, N]`; arguments as of the public `full_attention`."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=call.scale,
        is_causal=True,
        local_window_size=None if call.window is None else (call.window - 1, 0),
        implementation="cudnn",
    )
