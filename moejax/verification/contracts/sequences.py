"""What all promise that turn sequences `[B, S, D]` into sequences, seen on two packed rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.types import Context
from moejax.verification.contracts.cases import (
    make_context,
    quick_jit,
    random_variables,
    require,
)

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
TASKS = np.array([[0] * 7, [1] * 7])
MASK = SEGMENTS > 0


class SequenceCase:
    """A method `(x [B, S, d_in], context) -> [B, S, ...]` with variables, compiled once."""

    def __init__(self, method: Any, d_in: int):
        self.method = method
        self.context = self.make_context(
            MASK,
            slice(None),
            slice(None),
            segment_ids=SEGMENTS,
            positions=jnp.asarray(POSITIONS),
        )
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((*MASK.shape, d_in)).astype(np.float32)
        self.variables = random_variables(method, self.x, self.context)
        self.call = lambda variables, x, context: method.apply(variables, x, context)
        self.run = quick_jit(self.call)
        self.y = np.asarray(self.run(self.variables, self.x, self.context))

    def make_context(self, mask: Any, rows: slice, columns: slice, **changes: Any) -> Context:
        """A context with the tasks of these positions."""
        return make_context(mask, task_ids=jnp.asarray(TASKS[rows, columns]), **changes)

    def changed_by(self, row: int, column: int) -> np.ndarray:
        """Where the output differs, bit for bit, when one token's input does."""
        x = self.x.copy()
        x[row, column] += 1.0
        y = np.asarray(self.run(self.variables, x, self.context))
        return (y != self.y).any(axis=-1)


def a_token_changes_itself_and_later_tokens_of_its_segment_only(case: SequenceCase) -> None:
    """Causality, and documents that do not see each other."""
    for row, column in ((0, 1), (0, 4), (1, 0), (1, 4)):
        allowed = np.equal(SEGMENTS, SEGMENTS[row, column]) & (np.arange(7) >= column)
        allowed[1 - row] = False
        changed = case.changed_by(row, column)
        require(changed[row, column], "a token does not see itself")
        require(
            not (changed & ~allowed).any(),
            f"the token {column} of row {row} reached {np.argwhere(changed & ~allowed).tolist()}",
        )


def padding_changes_nothing(case: SequenceCase) -> None:
    """What stands at padding reaches no real token."""
    x = np.where(MASK[..., None], case.x, 100.0).astype(np.float32)
    y = np.asarray(case.run(case.variables, x, case.context))
    np.testing.assert_array_equal(y[MASK], case.y[MASK])


def a_packed_segment_equals_the_segment_alone(case: SequenceCase) -> None:
    """Packing changes nothing."""
    rows, columns = slice(0, 1), slice(3, 7)
    context = case.make_context(np.ones((1, 4), bool), rows, columns)
    alone = case.run(case.variables, case.x[rows, columns], context)
    np.testing.assert_allclose(alone, case.y[rows, columns], rtol=1e-5, atol=1e-6)


def decoding_token_by_token_equals_the_whole(case: SequenceCase) -> None:
    """Two sequences (4 and 5 tokens), prompts of 1 and 3 beside each other, then token by token.

    As generation does it: what stands behind the shorter prompt is padding, each row goes on at its
    own position, and a row that has ended gets padding.
    """
    x = np.stack([np.pad(case.x[0, 3:], ((0, 1), (0, 0))), case.x[1, :5]])
    prompts, lengths = np.array([1, 3]), np.array([4, 5])
    make = lambda mask, **changes: case.make_context(
        mask, slice(None), slice(0, mask.shape[1]), **changes
    )
    whole = case.run(case.variables, x, make(np.arange(5) < lengths[:, None]))
    step = quick_jit(lambda v, x, c: case.method.apply(v, x, c, mutable=["cache"]))
    variables, got = case.variables, np.full(whole.shape, np.nan)
    prefill = np.broadcast_to(np.arange(prompts.max()), (2, prompts.max()))
    chunks = [(prefill, prompts), *((prompts[:, None] + i, lengths) for i in range(3))]
    for positions, ends in chunks:
        mask = positions < ends[:, None]
        own = np.take_along_axis(x, np.minimum(positions, 4)[..., None], axis=1)
        own = np.where(mask[..., None], own, 100.0).astype(np.float32)
        context = make(mask, positions=jnp.asarray(positions, jnp.int32))
        y, cache = step(variables, own, context.replace(decode=True, cache_length=8))
        variables = case.variables | cache
        rows, columns = np.nonzero(mask)
        got[rows, positions[rows, columns]] = np.asarray(y)[rows, columns]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], whole[row, :length], rtol=1e-5, atol=1e-6)


def flipped(context: Context) -> Context:
    """The context of the rows in the opposite order."""
    keys = None if context.key is None else context.key[::-1]
    turn = lambda a: a[::-1] if jnp.ndim(a) == 2 else a
    return jax.tree.map(turn, context.replace(key=None)).replace(key=keys)
