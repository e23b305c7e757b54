"""A batch with very unequal padding, and models, states and steps for it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moejax.balance.load_balance import (
    LaggedLoadBalance,
    SequenceLoadBalance,
    TwoPassLoadBalance,
)
from moejax.balance.loss_free import LossFreeBias
from moejax.balance.z_loss import RouterZLoss
from moejax.objectives.lm import NextToken
from moejax.optim.guard import Guard
from moejax.train.state import TrainState
from moejax.train.step import make_train_step
from moejax.types import Batch
from tests.models.tiny_model import VOCAB, attention, moe, random_model_variables, tiny

RULES = (
    SequenceLoadBalance(weight=0.3),
    TwoPassLoadBalance(weight=0.2),
    LaggedLoadBalance(weight=0.1),
    RouterZLoss(weight=0.05),
    LossFreeBias(rate=0.01),
)
TOKEN_BYTES = jnp.arange(VOCAB) % 3 + 1
GUARD = Guard(window=4, min_history=2)
LENGTHS = (7, 2, 5, 1)  # of the batch's sequences: very unequal padding


def model_with(balance=RULES, **changes):
    return tiny(attention=attention(qk_norm=None), ffn=moe(shared=None, balance=balance), **changes)


def make_batch(pad_token=0):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (4, 8))
    real = np.arange(8) < np.array(LENGTHS)[:, None] + 1  # inputs and the last target
    mask = np.arange(8) < np.array(LENGTHS)[:, None]
    targets = np.where(mask, np.roll(tokens, -1, axis=1), pad_token)
    positions = np.where(real, np.arange(8), 0)
    return Batch(
        tokens=jnp.asarray(np.where(real, tokens, pad_token), jnp.int32),
        targets=jnp.asarray(targets, jnp.int32),
        loss_mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(real, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
    )


NUM_TOKENS = sum(min(n + 1, 8) for n in LENGTHS)
NUM_TARGETS = sum(LENGTHS)


def make_state(model, optimizer, *, seed=0):
    variables = random_model_variables(model, seed=seed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        frozen=jax.tree.map(lambda _: None, variables["params"]),
        router_state=variables.get("router_state", {}),
        opt_state=optimizer.init(variables["params"]),
        guard=GUARD.init(),
        key=jax.random.key(0),
    )


def make_step(model, optimizer, *, num_microbatches=1, objective=None):
    return make_train_step(
        model,
        objective or NextToken(z_weight=0.01),
        optimizer,
        GUARD,
        num_microbatches=num_microbatches,
        token_bytes=TOKEN_BYTES,
    )


def numeric(state):
    return {name: getattr(state, name) for name in ("params", "opt_state", "router_state", "step")}


def with_pad_token(token):
    """A batch whose padding is `token`, which no real position uses."""
    batch = make_batch(pad_token=token)
    real = batch.segment_ids > 0
    tokens = jnp.where(real & (batch.tokens == token), 1, batch.tokens)
    return dataclasses.replace(batch, tokens=tokens)


def with_nan_pad_embedding(state, token):
    embedding = state.params["embed"]["embedding"].at[token].set(jnp.nan)
    params = state.params | {"embed": {"embedding": embedding}}
    return dataclasses.replace(state, params=params)
