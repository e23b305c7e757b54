"""What every attention method promises."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moejax.verification.contracts.cases import (
    float_dtypes,
    make_context,
    quick_jit,
    random_variables,
    require,
    require_finite,
    to_dtype,
)

D_MODEL = 16
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
MASK = SEGMENTS > 0


class Case:
    """An attention method with variables, compiled once, and its input `[B, S, D]`."""

    def __init__(self, method: nn.Module):
        self.method = method
        self.context = make_context(MASK, segment_ids=SEGMENTS, positions=jnp.asarray(POSITIONS))
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((*MASK.shape, D_MODEL)).astype(np.float32)
        self.variables = random_variables(method, self.x, self.context)
        self.call = lambda variables, x, context: method.apply(variables, x, context)
        self.run = quick_jit(self.call)
        self.y = np.asarray(self.run(self.variables, self.x, self.context))

    def changed_by(self, row: int, column: int) -> np.ndarray:
        """Where the output differs, bit for bit, when one token's input does."""
        x = self.x.copy()
        x[row, column] += 1.0
        y = np.asarray(self.run(self.variables, x, self.context))
        return (y != self.y).any(axis=-1)


def a_token_changes_itself_and_later_tokens_of_its_segment_only(case: Case) -> None:
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


def padding_changes_nothing(case: Case) -> None:
    """What stands at padding reaches no real token."""
    x = np.where(MASK[..., None], case.x, 100.0).astype(np.float32)
    y = np.asarray(case.run(case.variables, x, case.context))
    np.testing.assert_array_equal(y[MASK], case.y[MASK])


def rows_of_the_batch_are_independent(case: Case) -> None:
    """Sequences do not see each other."""
    flipped = jax.tree.map(lambda a: a[::-1] if jnp.ndim(a) == 2 else a, case.context)
    y = case.run(case.variables, case.x[::-1], flipped)
    np.testing.assert_allclose(np.asarray(y)[::-1], case.y, rtol=1e-5, atol=1e-6)


def a_packed_segment_equals_the_segment_alone(case: Case) -> None:
    """Packing changes nothing."""
    rows = (slice(0, 1), slice(3, 7))
    context = make_context(np.ones((1, 4), bool))
    alone = case.run(case.variables, case.x[rows], context)
    np.testing.assert_allclose(alone, case.y[rows], rtol=1e-5, atol=1e-6)


def decoding_token_by_token_equals_the_whole(case: Case) -> None:
    """Two ragged sequences (4 and 5 tokens), a prefill of 2 and then one token at a time."""
    x = np.stack([np.pad(case.x[0, 3:], ((0, 1), (0, 0))), case.x[1, :5]])
    lengths = np.array([4, 5])
    whole = case.run(case.variables, x, make_context(np.arange(5) < lengths[:, None]))
    step = quick_jit(lambda v, x, c: case.method.apply(v, x, c, mutable=["cache"]))
    variables, outputs = case.variables, []
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 5)):
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (2, stop - start))
        context = make_context(positions < lengths[:, None], positions=jnp.asarray(positions))
        context = context.replace(decode=True, cache_length=8)
        y, cache = step(variables, x[:, start:stop], context)
        variables = case.variables | cache
        outputs.append(y)
    got = np.concatenate(outputs, axis=1)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(got[row, :length], whole[row, :length], rtol=1e-5, atol=1e-6)


def gradients_are_finite_and_reach_every_parameter(case: Case) -> None:
    """No parameter is without effect."""
    loss = lambda v: jnp.sum(jnp.sin(case.call(v, jnp.asarray(case.x), case.context)))
    require_finite(quick_jit(jax.grad(loss))(case.variables), what="the gradient of ")


def bf16_gives_bf16_and_float64_stays_float64(case: Case) -> None:
    """Softmax in at least float32, and no intermediate of a float64 run is narrower."""
    half = to_dtype((case.variables, case.x), jnp.bfloat16)
    dtype = jax.eval_shape(case.call, *half, case.context).dtype
    require(dtype == jnp.bfloat16, f"bfloat16 input gives {dtype}")
    found = float_dtypes(case.call, *half, case.context)
    require("float32" in found, "a bfloat16 run computes its softmax in bfloat16")
    with jax.enable_x64(True):
        wide = to_dtype((case.variables, case.x), jnp.float64)
        found = float_dtypes(case.call, *wide, case.context)
    require(found == {"float64"}, f"a float64 run computes in {', '.join(sorted(found))}")


CHECKS = (
    a_token_changes_itself_and_later_tokens_of_its_segment_only,
    padding_changes_nothing,
    rows_of_the_batch_are_independent,
    a_packed_segment_equals_the_segment_alone,
    decoding_token_by_token_equals_the_whole,
    gradients_are_finite_and_reach_every_parameter,
    bf16_gives_bf16_and_float64_stays_float64,
)
