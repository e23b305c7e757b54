"""What a router of adapters sees: the token, the sequence so far, the task, or nothing."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.errors import UserError
from moejax.types import Context, at_least_f32


class Token(nn.Module):
    """The token's own features."""

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Float[Array, "B S F"]:
        return x


class Sequence(nn.Module):
    """The mean of the features of the tokens so far, the own one included, within a segment.

    Causal, so that a model that generates sees what it saw in training. Decoding keeps the sum and
    the number of tokens in the collection `cache`; of a sum no token can be taken back, so a token
    at another position than the next gives NaN.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Float[Array, "B S F"]:
        real = context.token_mask[..., None]
        # The number of tokens is one more feature.
        features = jnp.concatenate([x.astype(at_least_f32(x.dtype)), real], axis=-1)
        begins = _begins(jnp.asarray(context.segment_ids))
        if context.decode:  # a row is one sequence, and padding, before or behind, ends none
            begins = jnp.zeros_like(begins)
        sums = _sums_so_far(jnp.where(real, features, 0), begins)
        if context.decode:
            shape = (x.shape[0], 1, sums.shape[-1])
            before = self.variable("cache", "sums", jnp.zeros, shape, sums.dtype)
            sums = sums + before.value
            before.value = sums[:, -1:]
            next_ones = sums[..., -1:] == context.positions[..., None] + 1
            sums = jnp.where(real & ~next_ones, jnp.nan, sums)
        return (sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)).astype(x.dtype)


class Task(nn.Module):
    """Which of `num_tasks` the row belongs to: of a `Mixture` of data, its source.

    NaN for a row of any other task, never a mixture for no task. Raises UserError where nobody says
    (`task_ids` of the model's `apply`).
    """

    num_tasks: int

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Float[Array, "B 1 num_tasks"]:
        if context.task_ids is None and not self.is_initializing():
            raise UserError(
                "an adapter routes by task, and no task ids were given: train on a Mixture "
                "(data.train), whose sources are the tasks, or pass task_ids to model.apply"
            )
        ids = jnp.zeros_like(context.segment_ids) if self.is_initializing() else context.task_ids
        ids = ids[:, :1]
        known = (ids >= 0) & (ids < self.num_tasks)
        return jnp.where(known[..., None], jax.nn.one_hot(ids, self.num_tasks), jnp.nan).astype(
            x.dtype
        )


class Static(nn.Module):
    """Nothing: one set of weights for all."""

    @nn.compact
    def __call__(self, x: Float[Array, "B S F"], context: Context) -> Float[Array, "B 1 1"]:
        return jnp.ones((x.shape[0], 1, 1), x.dtype)


def _begins(segment_ids: Int[Array, "B S"]) -> Bool[Array, "B S 1"]:
    """Where a segment begins within a row."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)))[..., None]


def _sums_so_far(x: Float[Array, "B S F"], begins: Bool[Array, "B S 1"]) -> Float[Array, "B S F"]:
    """Sums along S that start anew where a segment begins; nothing passes from one to another."""

    def join(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (sums, anew), (own, starts) = left, right
        return jnp.where(starts, own, sums + own), anew | starts

    return jax.lax.associative_scan(join, (x, begins), axis=1)[0]
