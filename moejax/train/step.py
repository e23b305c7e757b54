"""One training step: a pure function `(state, batch) -> (state, metrics)`.

With several microbatches the gradient is that of the whole batch, exactly: every term's count is
known before the first gradient is taken, so each microbatch contributes its sum over the
batch's count. The counts, and the loads of two-pass balancing, come from a forward pass without
gradient; where only counts are needed, which depend on masks alone, the compiler removes the
rest of that pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from moejax.kernels import compat
from moejax.layers.row_keys import row_keys
from moejax.models.transformer import Transformer
from moejax.objectives.objective import Objective, Result
from moejax.optim import freeze
from moejax.optim.guard import Guard, select
from moejax.optim.optimizer import global_norm
from moejax.train.state import TrainState, variables_of
from moejax.types import Batch, at_least_f32, named_leaves

Metrics = dict[str, Any]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: Transformer,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    guard: Guard,
    *,
    num_microbatches: int,
    token_bytes: Array,
    only: Callable[[Any], Any] = lambda tree: tree,
) -> Step:
    """The step as a function, for `jit_step`.

    `only` makes a tree like the trainable parameters zero where none of it shall train
    (`freeze.only_experts`); it is applied to gradients and to updates.

    Metrics are sums over the batch: `terms` and `measures` of the objective, `stats` per layer,
    and the scalars `loss`, `grad_norm` (before clipping), `update_norm`, `accepted`, `skipped`
    (refused so far), `num_updates` (that made the parameters), `exhausted`.
    """
    weights = objective.weights(model)
    optimizer = optax.with_extra_args_support(optimizer)

    def forward(params: Any, state: TrainState, batch: Batch, key: Array, loads: Any) -> Result:
        variables = variables_of(freeze.merge(params, state.frozen), state.router_state)
        return objective(
            model, variables, batch, token_bytes=token_bytes, step=state.step, key=key, loads=loads
        )

    def loss(params, state, batch, key, counts, loads):
        result = forward(params, state, batch, key, loads)
        own = {name: count for name, (_, count) in result.terms.items()}
        counts = jax.lax.stop_gradient(own if counts is None else counts)
        total = sum(
            weight * result.terms[name][0] / jnp.maximum(counts[name], 1)
            for name, weight in weights.items()
        )
        return total, result

    grad = jax.value_and_grad(loss, has_aux=True)

    def whole_batch(state: TrainState, batch: Batch, keys: Array):
        (value, result), gradient = grad(state.params, state, batch, keys, None, None)
        return value, gradient, result

    def in_microbatches(state: TrainState, batch: Batch, keys: Array):
        split = functools.partial(_split, num_microbatches=num_microbatches)
        parts, keys = jax.tree.map(split, (batch, keys))
        counts, loads = _first_pass(model, forward, state, parts, keys)

        def one(part):
            (value, result), gradient = grad(state.params, state, *part, counts, loads)
            # Summed in at least float32, whatever the parameters are stored in.
            gradient = jax.tree.map(lambda g: g.astype(at_least_f32(g.dtype)), gradient)
            return value, gradient, result

        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (parts, keys)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)
        return jax.lax.scan(add, zeros, (parts, keys))[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        run = whole_batch if num_microbatches == 1 else in_microbatches
        value, gradient, result = run(state, batch, row_keys(key, batch.tokens.shape[0]))
        gradient = only(gradient)

        grad_norm = global_norm(gradient)
        update = functools.partial(optimizer.update, grad_norm=grad_norm)
        updates, _ = update(gradient, state.opt_state, state.params)
        updates = only(updates)  # weight decay too
        updates = jax.lax.optimization_barrier(updates)  # stored, not computed for each reader
        update_norm = global_norm(updates)
        accepted, guard_state = guard.decide(state.guard, value, grad_norm, update_norm)
        advance = functools.partial(model.update_router_state, frozen=_frozen_routers(state))
        # A second time for the state alone, from a gradient that waits for the verdict: so the new
        # moments go straight to where the old ones were and are never stored beside them.
        judged = jax.tree.map(lambda g: jnp.where(accepted, g, 0), gradient)
        _, opt_state = update(judged, state.opt_state, state.params)
        new = {
            "params": optax.apply_updates(state.params, updates),
            "opt_state": opt_state,
            "router_state": advance(state.router_state, result.stats),
        }
        old = {name: getattr(state, name) for name in new}
        state = TrainState(
            step=state.step + 1,
            guard=guard_state,
            key=state.key,
            frozen=state.frozen,
            **select(accepted, new, old),
        )
        metrics = {
            "loss": value,
            "terms": result.terms,
            "measures": result.measures,
            "stats": result.stats,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "accepted": accepted,
            "skipped": guard_state.num_nonfinite + guard_state.num_spikes,
            "num_updates": guard_state.num_accepted,
            "exhausted": guard.exhausted(guard_state),
        }
        return state, metrics

    return train_step


def _frozen_routers(state: TrainState) -> set[str]:
    """The stacks of layers whose routers have parameters, of which none train."""
    of_router = lambda tree, layers: any(f"{layers}/ffn/router/" in x for x in named_leaves(tree))
    trains, stays = (
        {layers for layers in state.router_state if of_router(tree, layers)}
        for tree in (state.params, state.frozen)
    )
    return stays - trains


def jit_step(step: Step, *, shardings: tuple[Any, Any] | None = None) -> Step:
    """The step compiled, its state donated: the old state's buffers hold the new one.

    `shardings` say where (state, metrics) lie; left to the compiler otherwise.
    """
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=shardings,
        compiler_options=compat.compiler_options(),
    )


def _split(x: Array, *, num_microbatches: int) -> Array:
    """`[B, ...]` to `[n, B/n, ...]`; part i takes every n-th row, so it keeps the data sharding."""
    return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)


def _first_pass(model: Transformer, forward, state: TrainState, parts: Batch, keys: Array):
    """(count of every term over the batch, share of choices per expert or None)."""
    rules = model.moe.balance if model.moe is not None else ()
    needs_loads = any(rule.loads == "two_pass" for rule in rules)

    def one(_, part):
        result = forward(state.params, state, *part, None)
        counts = {name: count for name, (_, count) in result.terms.items()}
        loads = {name: stats["load"] for name, stats in result.stats.items()}
        return None, (counts, loads if needs_loads else {})

    _, sums = jax.lax.scan(one, None, (parts, keys))
    counts, loads = jax.lax.stop_gradient(jax.tree.map(lambda x: x.sum(axis=0), sums))
    if not needs_loads:
        return counts, None
    # Shares in the terms' dtype: a float64 run divides in float64.
    dtype = next(iter(counts.values())).dtype
    shares = lambda load: load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1)
    return counts, {name: shares(load.astype(dtype)) for name, load in loads.items()}
