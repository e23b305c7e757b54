"""Where a decoding cache is written, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.full import FullAttention
from moejax.attention.mla import MultiHeadLatentAttention
from moejax.attention.moba import MoBA
from moejax.errors import UserError
from moejax.layers import decoding_cache
from moejax.layers.short_convolution import ShortConvolution
from moejax.verification.contracts.cases import make_context, random_variables

FULL = FullAttention(num_heads=2, num_kv_heads=1)
METHODS = {
    "full": FULL,
    "blocks": MoBA(num_heads=2, num_kv_heads=1, block_size=2, top_k=1),
    "latent": MultiHeadLatentAttention(
        num_heads=2, kv_lora_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3
    ),
    "convolution": FULL.copy(key_conv=ShortConvolution()),
}


def at(positions, *, cache_length=4):
    positions = jnp.asarray(positions, jnp.int32)
    context = make_context(np.ones(positions.shape, bool), positions=positions)
    return context.replace(decode=True, cache_length=cache_length)


def test_new_positions_go_to_their_slots_and_padding_nowhere():
    context = at([[1, 2], [0, -1]])
    context = context.replace(token_mask=jnp.array([[True, False], [True, True]]))
    new = jnp.arange(1.0, 5.0).reshape(2, 2, 1)
    got = decoding_cache.write(jnp.zeros((2, 4, 1)), new, context)[..., 0]
    np.testing.assert_array_equal(got, [[0, 1, 0, 0], [3, 0, 0, 0]])


def test_a_position_without_a_slot_is_nan():
    out = decoding_cache.where_slots_are(jnp.ones((1, 3, 2, 1)), at([[-1, 3, 4]]))
    np.testing.assert_array_equal(np.isnan(out[0, :, 0, 0]), [True, False, True])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_cache_of_other_slots_or_rows_is_refused(unchecked, method):
    """With blocks the keys of slots that do not exist were dropped."""
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    variables = random_variables(method, x, make_context(np.ones((2, 3), bool)))
    first = at([[0, 1, 2]] * 2)
    _, cache = method.apply(variables, jnp.asarray(x), first, mutable=["cache"])
    for rows, cache_length in ((2, 6), (2, 3), (1, 4)):
        context = at([[2]] * rows, cache_length=cache_length)
        text = f"2 rows of 4 slots, .* {rows} rows with cache_length={cache_length}"
        with pytest.raises(UserError, match=text):
            method.apply(variables | cache, jnp.asarray(x[:rows, 2:]), context, mutable=["cache"])
