"""Decoding with a cache gives the logits of the full pass, for every architecture.

The golden logits are the full pass of transformers, which tests/models/test_hf_parity.py compares
with ours. 12 positions are longer than every window (5), so old slots fall out of sight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.verification.contracts.cases import quick_jit
from tests.models.test_hf_parity import GOLDEN, MODELS, _variables

PROMPTS = np.array([3, 6])  # tokens of each row that are prefilled together


def decoded(model, variables, tokens):
    """Logits `[B, S, V]`: prompts of unequal length at once, then token by token, as `generate`."""
    batch, length = tokens.shape
    longest = int(PROMPTS.max())
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)

    def forward(cache, ids, at, mask):
        out = model.apply(
            variables | {"cache": cache},
            ids,
            segment_ids=mask.astype(jnp.int32),
            positions=at,
            cache_length=length,
        )
        return out.logits, out.cache

    real = positions[:, :longest] < PROMPTS[:, None]
    ids = jnp.where(real, tokens[:, :longest], 0)
    cache = model.init_cache(variables, batch, length)
    prefilled, cache = forward(cache, ids, positions[:, :longest], real)

    def step(cache, index):
        at = jnp.minimum(PROMPTS + index, length - 1)[:, None]
        logits, cache = forward(
            cache, jnp.take_along_axis(tokens, at, axis=1), at, jnp.ones((batch, 1), bool)
        )
        return cache, (at[:, 0], logits[:, 0])

    _, (at, rest) = jax.lax.scan(step, cache, jnp.arange(length - PROMPTS.min()))
    out = jnp.full((batch, length, model.vocab_size), jnp.nan)
    out = out.at[:, :longest].set(jnp.where(real[..., None], prefilled, jnp.nan))
    return out.at[jnp.arange(batch), at].set(rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_decoding_gives_the_logits_of_the_full_pass(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), MODELS[name]
    run = quick_jit(lambda v, t: decoded(model, v, t))
    logits = run(_variables(model, golden), jnp.asarray(golden["tokens"]))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-5, rtol=1e-5)
