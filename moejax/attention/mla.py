"""Multi-head latent attention: keys and values from one small latent per position, which is cached.

DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1 and appendix C; DeepSeek-V3, 2412.19437.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.kernels.full_attention import full_attention
from moejax.kernels.full_attention.softmax import heads_first, heads_last, softmax_attention
from moejax.layers import decoding_cache
from moejax.layers.linear import Linear, matrix_of
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope, YarnScaling
from moejax.parallel.context_parallel import FewestBytes, Way, without_devices
from moejax.types import Context

# A latent is small and whole on every device; "embed" splits the matrices on both sides of it.
_INTO_LATENT, _INTO_HEADS = ("embed", None), ("embed", "heads")


class MultiHeadLatentAttention(nn.Module):
    """Attention whose heads expand a shared latent, and share one rotated key.

    With c = norm(x W_kv_down) of width `kv_lora_rank`, a head's key is [c W_key, rope(x W_shared)]
    and its value c W_value; `kv_down` holds W_kv_down and W_shared, `kv_up` W_key and W_value of
    each head in turn. Queries are [q, rope(q')], from x or from a latent of their own. What a
    position may see is as in `FullAttention`.

    Attributes:
      num_heads: heads H; each has a key and a value of its own.
      kv_lora_rank: width of the latent of keys and values.
      q_lora_rank: width of the queries' latent; None projects queries from x directly.
      nope_head_dim: width of the part of queries and keys that is not rotated.
      rope_head_dim: width of the rotated part; its key is the same for every head.
      v_head_dim: width of a head's value.
      rope: rotary embedding of all of the rotated part, or None for none. YaRN's `mscale_all_dim`
        multiplies the attention logits by m(mscale_all_dim)^2, beside what it does to the rotation.
      latent_norm: prototype of the norm of each latent.
      use_bias: biases on what is projected from x, and on the output projection; the projections
        from latents have none, and neither do queries without a latent.
      linear: prototype of the projections; adapters replace it. `kv_up` has to be one matrix for
        all tokens where decoding is wanted (`layers.linear.matrix_of`).
      implementation: of the kernel in training; None lets it choose.
      context_parallel: as in `FullAttention`.

    Training expands keys and values. Decoding keeps `kv_lora_rank + rope_head_dim` numbers per
    position in the collection `cache` and expands none of them: the queries are multiplied by W_key
    and the results by W_value instead, which is the same product in another order, and all heads
    attend to the one key [c, rotated key], with c for a value.
    """

    num_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None = None
    nope_head_dim: int = 128
    rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    latent_norm: nn.Module = dataclasses.field(default_factory=RMSNorm)
    use_bias: bool = False
    linear: nn.Module = dataclasses.field(default_factory=Linear)
    implementation: str | None = None
    context_parallel: Way = dataclasses.field(default_factory=FewestBytes)

    @property
    def head_widths(self) -> tuple[int, int]:
        """Widths of a head's key and of its value."""
        return self.nope_head_dim + self.rope_head_dim, self.v_head_dim

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        self._check()
        batch, length, d_model = x.shape
        heads, nope = self.num_heads, self.nope_head_dim
        q, q_rotated = self._queries(x, context)
        width = self.kv_lora_rank + self.rope_head_dim
        down = self._linear("kv_down", width, _INTO_LATENT, self.use_bias)(x, context)
        latent = self.latent_norm.copy(name="kv_norm")(down[..., : self.kv_lora_rank])
        k_rotated = self._rotate(down[..., None, self.kv_lora_rank :], context)  # of one head

        kv_up = self._linear("kv_up", heads * (nope + self.v_head_dim), _INTO_HEADS)
        if context.decode and not self.is_initializing():
            cached = self._cache(jnp.concatenate([latent, k_rotated[:, :, 0]], -1), context)
            up = matrix_of(kv_up, x.dtype).reshape(self.kv_lora_rank, heads, -1)
            out = self._attend_latents(q, q_rotated, cached, up, context)
        else:
            kv = kv_up(latent, context).reshape(batch, length, heads, -1)
            q = jnp.concatenate([q, q_rotated], -1)
            k_rotated = jnp.broadcast_to(k_rotated, q_rotated.shape)
            k = jnp.concatenate([kv[..., :nope], k_rotated], -1)
            out = self._attend(q, k, kv[..., nope:], context)
        output = self._linear("output", d_model, ("heads", "embed"), self.use_bias)
        return output(out.reshape(batch, length, -1), context)

    def _attend(self, q: Array, k: Array, v: Array, context: Context) -> Array:
        def attend(q: Array, k: Array, v: Array, ids: Array, offset: Any) -> Array:
            return full_attention(
                q,
                k,
                v,
                segment_ids=ids,
                window=context.window,
                scale=self._scale(),
                q_offset=offset,
                implementation=self.implementation,
            )

        # Initialisation has a row of any length.
        way = without_devices if self.is_initializing() else self.context_parallel
        return way(attend, q, k, v, context.segment_ids)

    def _queries(self, x: Array, context: Context) -> tuple[Array, Array]:
        """The parts `[B, S, H, ...]` of the queries: as they are, and rotated."""
        width = self.num_heads * self.head_widths[0]
        if self.q_lora_rank is None:
            q = self._linear("query", width, _INTO_HEADS)(x, context)
        else:
            down = self._linear("query_down", self.q_lora_rank, _INTO_LATENT, self.use_bias)
            latent = self.latent_norm.copy(name="query_norm")(down(x, context))
            q = self._linear("query_up", width, _INTO_HEADS)(latent, context)
        q = q.reshape(*x.shape[:2], self.num_heads, -1)
        nope = self.nope_head_dim
        return q[..., :nope], self._rotate(q[..., nope:], context)

    def _linear(
        self, name: str, features: int, axes: tuple[str | None, ...], use_bias: bool = False
    ) -> nn.Module:
        return self.linear.copy(features=features, use_bias=use_bias, axes=axes, name=name)

    def _rotate(self, part: Float[Array, "B S G R"], context: Context) -> Float[Array, "B S G R"]:
        if self.rope is None:
            return part
        return self.rope(part, context.positions, context.cache_length)

    def _cache(self, new: Float[Array, "B S C"], context: Context) -> Float[Array, "B M C"]:
        """Every position's latent and rotated key, the new ones among them."""
        batch, length, width = new.shape
        shape = (batch, decoding_cache.num_slots(length, context), width)
        cached = self.variable("cache", "cached_latent", jnp.zeros, shape, new.dtype)
        cached.value = decoding_cache.write(cached.value, new, context)
        return cached.value

    def _attend_latents(
        self, q: Array, q_rotated: Array, cached: Array, up: Array, context: Context
    ) -> Float[Array, "B S H Nv"]:
        """Attention over the cache `[B, M, C]`; `up` is kv_up's matrix `[latent, H, N + Nv]`."""
        nope, rank = self.nope_head_dim, self.kv_lora_rank
        # (c W_key) q = c (W_key q), and (weights c) W_value = weights (c W_value).
        q = jnp.einsum("bshn,chn->bshc", q, up[..., :nope])
        q, key = jnp.concatenate([q, q_rotated], -1), cached[:, :, None]
        # Values are the keys; cutting the result is cheaper than copying all slots without the end.
        out = softmax_attention(
            *heads_first(q, key, key), decoding_cache.visible(context), scale=self._scale()
        )
        out = jnp.einsum("bshc,chn->bshn", heads_last(out)[..., :rank], up[..., nope:])
        return decoding_cache.where_slots_are(out, context)

    def _scale(self) -> float:
        scale = self.head_widths[0] ** -0.5
        scaling = None if self.rope is None else self.rope.scaling
        if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim:
            scale *= scaling.magnitude(scaling.mscale_all_dim) ** 2
        return scale

    def _check(self) -> None:
        widths = ("num_heads", "kv_lora_rank", "nope_head_dim", "rope_head_dim", "v_head_dim")
        for name in (*widths, "q_lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"attention.{name}={value} must be at least 1")
        if self.rope is not None and self.rope.fraction != 1:
            raise UserError(
                f"attention.rope.fraction={self.rope.fraction} must be 1: how much of a head is "
                "rotated is attention.rope_head_dim"
            )


def example() -> tuple[MultiHeadLatentAttention, MultiHeadLatentAttention]:
    """Small instances with and without a latent of queries, for the contract tests."""
    widths = {"nope_head_dim": 4, "rope_head_dim": 2, "v_head_dim": 3}
    plain = MultiHeadLatentAttention(num_heads=2, kv_lora_rank=6, **widths)
    return plain, plain.copy(q_lora_rank=5, use_bias=True)
