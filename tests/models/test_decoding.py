"""What a decoding cache cannot serve is refused, or NaN where only the running program can see it.

That it equals the whole pass where it can: test_transformer.py, test_hybrid.py, test_hf_decoding.py
and the contracts of attention and adapters.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.mla import MultiHeadLatentAttention
from moejax.attention.moba import MoBA
from moejax.balance.load_balance import ShardLoadBalance
from moejax.errors import UserError
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import (
    attention,
    dense,
    moe,
    random_model_variables,
    tiny,
    tokens,
)

LENGTH = 8
METHODS = {
    "full": {"attention": attention(qk_norm=None)},
    "window": {"attention": attention(qk_norm=None), "windows": (3,)},
    "blocks": {"attention": MoBA(num_heads=4, num_kv_heads=2, block_size=2, top_k=2)},
    "latent": {
        "attention": MultiHeadLatentAttention(
            num_heads=4, kv_lora_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3
        )
    },
}


class Decoder:
    """A model with its cache: every call goes on with the cache that the last one left."""

    def __init__(self, model, *, compiled):
        self.model, self.variables, self.cache = model, random_model_variables(model), {}
        call = functools.partial(model.apply, cache_length=LENGTH)
        self._call = quick_jit(call) if compiled else call

    def __call__(self, ids, **fields):
        fields = {name: jnp.asarray(values) for name, values in fields.items()}
        out = self._call(self.variables | {"cache": self.cache}, jnp.asarray(ids), **fields)
        self.cache = out.cache
        return np.asarray(out.logits)

    def whole(self, ids):
        return np.asarray(quick_jit(self.model.apply)(self.variables, ids).logits)


@pytest.fixture(scope="module", params=METHODS)
def model(request):
    return dense(**METHODS[request.param])


def along(*counts):
    """Positions that count from 0 in each of the pieces of a row."""
    return np.concatenate([np.arange(count) for count in counts])[None]


IDS = np.asarray(tokens((2, LENGTH)))
LEFT = np.array([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
# {what is wrong with the first row: (its segments, its positions, what is said of it)}
WRONG = {
    "left padding, counted": (LEFT[0], along(6)[0], "positions 3, 4, 5, and .* written nowhere"),
    "packed": ([1, 1, 1, 2, 2, 2], along(3, 3)[0], "segments 1, 2, and .* one sequence"),
    "packed, counted": ([1, 1, 1, 2, 2, 2], along(6)[0], "segments 1, 2, and"),
    "a slot left out": ([1] * 6, [0, 1, 2, 4, 5, 6], "positions 0, 1, 2, 4, ..., and"),
    "twice": ([1] * 6, [0, 1, 1, 2, 3, 4], "positions 0, 1, 1, 2, ..., and"),
    "below zero": ([1] * 6, np.arange(-1, 5), "positions -1, 0, 1, 2, ..., and"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_a_cache_cannot_serve(wrong):
    """An error where the values are known; else NaN, for that row, now and from then on."""
    segments, positions, text = WRONG[wrong]
    fields = {
        "segment_ids": np.stack([np.asarray(segments), [1] * 6]),
        "positions": np.stack([np.asarray(positions), np.arange(6)]),
    }
    with pytest.raises(UserError, match=f"row 0 has tokens .*{text}"):
        Decoder(dense(), compiled=False)(IDS[:, :6], **fields)
    decoder = Decoder(dense(), compiled=True)
    whole = decoder.whole(IDS)
    logits = decoder(IDS[:, :6], **fields)
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1], whole[1, :6], rtol=1e-4, atol=1e-5)
    later = decoder(IDS[:, 6:7], positions=[[6], [6]])
    assert np.isnan(later[0]).all()
    np.testing.assert_allclose(later[1, 0], whole[1, 6], rtol=1e-4, atol=1e-5)
    anew = decoder(IDS[:, :2], positions=[[0, 1], [7, 8]])  # all that it sees is written now
    np.testing.assert_allclose(anew[0], whole[0, :2], rtol=1e-4, atol=1e-5)


def test_left_padding_with_the_positions_of_what_follows(model):
    """A prompt padded in front decodes as alone, its positions being its own."""
    decoder = Decoder(model, compiled=False)
    ids = np.stack([np.concatenate([[0, 0, 0], IDS[0, :3]]), IDS[1, :6]])
    positions = np.stack([[0, 0, 0, 0, 1, 2], np.arange(6)])
    logits = decoder(ids, segment_ids=LEFT, positions=positions)
    whole = decoder.whole(IDS)
    np.testing.assert_allclose(logits[0, 3:], whole[0, :3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1], whole[1, :6], rtol=1e-4, atol=1e-5)
    later = decoder(np.array([[IDS[0, 3]], [IDS[1, 6]]]), positions=[[3], [6]])
    np.testing.assert_allclose(later[0, 0], whole[0, 3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(later[1, 0], whole[1, 6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["left padding, counted", "packed"])
def test_no_method_of_attention_answers_for_them(model, wrong):
    segments, positions, _ = WRONG[wrong]
    decoder = Decoder(model, compiled=True)
    logits = decoder(IDS[:1, :6], segment_ids=[segments], positions=[positions])
    assert np.isnan(logits).all()


def test_a_call_goes_back_and_writes_anew_but_never_ahead(model):
    """As where guessed tokens are taken back: what stood behind is forgotten."""
    decoder = Decoder(model, compiled=True)
    decoder(IDS[:, :6], positions=along(6).repeat(2, axis=0))
    other = np.concatenate([IDS[:1, :3], IDS[1:, 3:]], axis=1)
    whole = decoder.whole(other)
    back = decoder(other[:, 3:5].repeat(2, axis=0), positions=[[3, 4]] * 2)
    np.testing.assert_allclose(back[0], whole[0, 3:5], rtol=1e-4, atol=1e-5)
    ahead = decoder(other[:, 6:7].repeat(2, axis=0), positions=[[6]] * 2)
    assert np.isnan(ahead).all()  # slot 5 holds what was taken back


def test_a_row_without_tokens_stays_as_it_is():
    decoder = Decoder(dense(), compiled=False)
    decoder(IDS[:, :3], positions=along(3).repeat(2, axis=0))
    decoder(IDS[:, 3:4], segment_ids=[[0], [1]], positions=[[9], [3]])
    logits = decoder(np.array([[IDS[0, 3]], [IDS[1, 4]]]), positions=[[3], [4]])
    whole = decoder.whole(IDS)
    np.testing.assert_allclose(logits[:, 0], whole[[0, 1], [3, 4]], rtol=1e-4, atol=1e-5)


def test_a_later_call_with_another_segment():
    first = {"segment_ids": np.full((1, 3), 1), "positions": along(3)}
    decoder = Decoder(dense(), compiled=False)
    decoder(IDS[:1, :3], **first)
    with pytest.raises(UserError, match="row 0 has tokens of the segments 1, 2, and"):
        decoder(IDS[:1, 3:4], segment_ids=[[2]], positions=[[3]])
    logits = decoder(IDS[:1, 3:], segment_ids=[[2] * 5], positions=along(5))  # begins anew
    np.testing.assert_allclose(logits, decoder.whole(IDS[:1, 3:]), rtol=1e-4, atol=1e-5)


def test_positions_have_no_default_with_a_cache():
    """The second call's token would stand in slot 0."""
    decoder = Decoder(dense(), compiled=False)
    first = decoder(IDS[:, :3])  # there is no cache yet
    np.testing.assert_allclose(first, decoder.whole(IDS)[:, :3], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="decoding with a cache needs positions"):
        decoder(IDS[:, 3:4])


def test_rules_about_batches_are_not_asked_of_a_prompt():
    """One row, which two shards do not divide."""
    model = tiny(ffn=moe(shared=None, balance=(ShardLoadBalance(weight=0.1, num_shards=2),)))
    with pytest.raises(UserError, match="num_shards=2 does not divide"):
        model.apply(random_model_variables(model), IDS[:1])
    assert np.isfinite(Decoder(model, compiled=False)(IDS[:1])).all()


def test_a_cache_is_not_left_aside():
    """Without a number of slots the tokens would be read as if they were all."""
    model = dense()
    variables = random_model_variables(model)
    cache = model.init_cache(variables, len(IDS), LENGTH)
    with pytest.raises(UserError, match="hold a decoding cache but the call has no cache_length"):
        model.apply(variables | {"cache": cache}, IDS[:, 3:4], positions=np.full((len(IDS), 1), 3))


@pytest.mark.parametrize("cap", [0.0, -2.0, np.inf, np.nan])
@pytest.mark.parametrize("cache_length", [None, LENGTH])
def test_a_soft_cap_that_cannot_be_is_refused_with_and_without_a_cache(cap, cache_length):
    model = dense(attention=attention(qk_norm=None, soft_cap=cap))
    variables = random_model_variables(dense())
    with pytest.raises(UserError, match=f"attention.soft_cap={cap} must be positive and finite"):
        model.apply(variables, IDS, cache_length=cache_length)


def test_a_cache_for_other_rows_or_slots_says_so(model):
    decoder = Decoder(model, compiled=True)
    decoder.cache = model.init_cache(decoder.variables, 2, LENGTH)
    with pytest.raises(UserError, match="made for 2 rows and the tokens have 1"):
        decoder(IDS[:1, :3], positions=along(3))
    variables = decoder.variables | {"cache": decoder.cache}
    at = jnp.asarray(along(3).repeat(2, axis=0))
    with pytest.raises(UserError, match="2 rows of 8 slots, and .* cache_length=12"):
        model.apply(variables, IDS[:, :3], positions=at, cache_length=12)
