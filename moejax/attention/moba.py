"""Block-sparse attention (MoBA): a query's own block and the few earlier ones that suit it most.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moejax.attention.full import FullAttention, over_rows
from moejax.errors import UserError
from moejax.kernels.block_attention import Heads, moba_attention
from moejax.kernels.block_attention.cached import attend_slots
from moejax.layers import decoding_cache, grouped_heads
from moejax.layers.grouped_heads import over_slots
from moejax.layers.linear import Linear
from moejax.layers.norm import RMSNorm
from moejax.layers.rope import Rope
from moejax.layers.short_convolution import ShortConvolution
from moejax.parallel.context_parallel import FewestBytes, Way, without_devices
from moejax.types import Context

_OF_BOTH = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope",
    "qk_norm",
    "key_conv",
    "use_bias",
    "use_output_bias",
    "linear",
    "context_parallel",
)


class MoBA(nn.Module):
    """Attention to `top_k` blocks of the own segment, chosen by the product with their mean key.

    Its parameters are those of a `FullAttention` with the same settings, in names and shapes: each
    can go on from the other's checkpoint. A segment of at most `top_k` blocks is attended whole.
    With `context.window` (`model.windows`) a layer attends its window, as `FullAttention` does, and
    no blocks: windows that alternate with None alternate the two.

    Attributes:
      num_heads, num_kv_heads, head_dim, rope, qk_norm, key_conv, use_bias, use_output_bias, linear:
        as in `FullAttention`. Blocks are chosen by what attention gets: keys after convolution and
        rotation. There are neither sinks nor a soft cap here.
      block_size: keys in a block, counted from the first token of a segment.
      top_k: blocks that a query attends, its own included.
      selection: "query": every query head chooses for itself. "group": those that share a key head
        choose together, by the sum of their scores.
      from_step, until_step: blocks are attended in the steps `from_step <= step < until_step` of
        training, and every earlier key in all others. None is no end.
      implementation: of the block kernel in training; None lets it choose.
      full_implementation: of the kernel where every key is attended.
      context_parallel: as in `FullAttention`.

    Softmax, its sums and the scores of blocks are in at least float32. Choices have no gradient.
    Decoding keeps keys and values as `FullAttention` does and chooses blocks among the slots, so
    that it equals the whole pass.
    """

    num_heads: int
    num_kv_heads: int
    block_size: int = 128
    top_k: int = 8
    selection: Heads = "query"
    from_step: int = 0
    until_step: int | None = None
    head_dim: int | None = None
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    qk_norm: nn.Module | None = None
    key_conv: nn.Module | None = None
    use_bias: bool = False
    use_output_bias: bool = False
    linear: nn.Module = dataclasses.field(default_factory=Linear)
    implementation: str | None = None
    full_implementation: str | None = None
    context_parallel: Way = dataclasses.field(default_factory=FewestBytes)

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S D"]:
        self._check()
        q, k, v = grouped_heads.projected(self, x, context)
        if context.decode:
            keys, values = decoding_cache.keys_and_values(self, k, v, context)
            blocks = functools.partial(self._blocks_of_slots, context=context)
            full = functools.partial(over_slots, context=context)
            out = self._either(blocks, full, context, q, keys, values)
            out = decoding_cache.where_slots_are(out, context)
        else:
            # Initialisation has a row of any length.
            way = without_devices if self.is_initializing() else self.context_parallel
            over_all = functools.partial(
                over_rows, window=context.window, implementation=self.full_implementation
            )
            blocks = functools.partial(way, self._blocks_of_rows)
            full = functools.partial(way, over_all)
            out = self._either(blocks, full, context, q, k, v, context.segment_ids)
        return grouped_heads.output(self, out, x.shape[-1], context)

    def full(self) -> FullAttention:
        """The layer of the same parameters that attends every earlier key."""
        same = {name: getattr(self, name) for name in _OF_BOTH}
        return FullAttention(**same, implementation=self.full_implementation, parent=None)

    def at_step(self, step: int) -> MoBA | FullAttention:
        """The layer as it computes at one step of training, without a switch."""
        if not self._chooses(step):
            return self.full()
        return self.clone(from_step=0, until_step=None)

    def mean_keys(self, length: int) -> float:
        """How many keys a query of a segment of `length` tokens attends, in the mean over them."""
        position = np.arange(length)
        past = np.minimum(position // self.block_size, self.top_k - 1)
        return float(np.mean(past * self.block_size + position % self.block_size + 1))

    def mean_scores(self, length: int) -> float:
        """How many (query, block) products choose the blocks of a token, over all heads."""
        if self.top_k == 1 or (length - 1) // self.block_size < self.top_k:
            return 0.0  # there is nothing to choose
        heads = self.num_heads if self.selection == "query" else self.num_kv_heads
        return float(np.mean(heads * (np.arange(length) // self.block_size)))

    def _either(self, blocks: Any, full: Any, context: Context, *arrays: Any) -> Array:
        """`blocks(*arrays)` or `full(*arrays)`, as the step says; only one of them is computed."""
        if context.window is not None:
            return full(*arrays)
        if (self.from_step, self.until_step) == (0, None):
            return blocks(*arrays)
        return jax.lax.cond(self._chooses(context.step), blocks, full, *arrays)

    def _chooses(self, step: Int[Array, ""] | int) -> Bool[Array, ""] | bool:
        """Whether blocks are attended at that step."""
        began = step >= self.from_step
        return began if self.until_step is None else began & (step < self.until_step)

    def _blocks_of_rows(self, q: Array, k: Array, v: Array, ids: Array, offset: Any) -> Array:
        if self.selection == "group" and q.shape[2] // k.shape[2] != self._group:
            raise UserError(
                f"attention.selection='group' needs the {self._group} query heads of a key head on "
                f"one device, and the mesh splits attention's {self.num_kv_heads} key heads more "
                "ways than they divide: make mesh.tensor smaller, set attention.context_parallel "
                "to GatheredKeys(), or attention.selection to 'query'"
            )
        return moba_attention(
            q,
            k,
            v,
            block_size=self.block_size,
            top_k=self.top_k,
            segment_ids=ids,
            q_offset=offset,
            heads=self.selection,
            implementation=self.implementation,
        )

    def _blocks_of_slots(self, q: Array, keys: Array, values: Array, *, context: Context) -> Array:
        return attend_slots(
            q,
            keys,
            values,
            jnp.asarray(context.positions),
            block_size=self.block_size,
            top_k=self.top_k,
            heads=self.selection,
        )

    @property
    def _group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def _check(self) -> None:
        for name in ("block_size", "top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"attention.{name}={getattr(self, name)} must be at least 1")
        if self.from_step < 0 or (
            self.until_step is not None and self.until_step <= self.from_step
        ):
            raise UserError(
                f"attention.from_step={self.from_step} and until_step={self.until_step} name no "
                "step: blocks are attended in from_step <= step < until_step; for none use "
                "FullAttention"
            )


def example() -> tuple[MoBA, MoBA, MoBA]:
    """Small instances, for the contract tests: of blocks so small that some are not chosen."""
    plain = MoBA(num_heads=4, num_kv_heads=2, block_size=2, top_k=2, qk_norm=RMSNorm())
    by_group = plain.copy(selection="group", top_k=1, block_size=3)
    return plain, by_group, plain.copy(key_conv=ShortConvolution(), until_step=1)
