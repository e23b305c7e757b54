"""The whole model: independence of what must not matter, and the numbers that must hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.experts.dense import DenseGLU
from moejax.routers.topk import TopK
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import (
    VOCAB,
    dense,
    moe,
    random_model_variables,
    tiny,
    tokens,
)

LENGTH = 10
A, B = 4, 3  # lengths of two documents


@pytest.fixture(scope="module")
def windowed():
    """One dense layer, then twice (full, window), with variables and a compiled forward pass."""
    model = tiny(num_layers=5, windows=(3, None), first_k_dense=1, dense_ffn=DenseGLU(d_ff=6))
    run = quick_jit(
        lambda v, t, segments, positions: model.apply(
            v, t, segment_ids=segments, positions=positions
        )
    )
    return model, random_model_variables(model), run


@pytest.fixture(scope="module")
def packed():
    """(tokens, segment ids, positions): both documents in one row, then each alone, padded."""
    a, b = np.asarray(tokens((A,))), np.asarray(tokens((B,), seed=1))
    ids = np.zeros((3, LENGTH), np.int32)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row, start, document, segment in ((0, 0, a, 1), (0, A, b, 2), (1, 0, a, 1), (2, 0, b, 1)):
        where = (row, slice(start, start + len(document)))
        ids[where], segments[where] = document, segment
        positions[where] = np.arange(len(document))
    return ids, segments, positions


def test_packed_documents_equal_documents_alone(windowed, packed):
    _, variables, run = windowed
    logits = np.asarray(run(variables, *packed).logits)
    np.testing.assert_allclose(logits[0, :A], logits[1, :A], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[0, A : A + B], logits[2, :B], rtol=1e-4, atol=1e-5)


def test_a_token_changes_nothing_before_it_bit_for_bit(windowed, packed):
    _, variables, run = windowed
    ids, segments, positions = packed
    logits = np.asarray(run(variables, *packed).logits)
    for column in (2, A + 1):
        other = ids.copy()
        other[0, column] = (other[0, column] + 1) % VOCAB
        changed = np.asarray(run(variables, other, segments, positions).logits) != logits
        changed = changed.any(axis=-1)
        assert changed[0, column]
        allowed = (segments == segments[0, column]) & (np.arange(LENGTH) >= column)
        allowed[1:] = False
        assert not (changed & ~allowed).any()


def test_what_padding_holds_changes_nothing(windowed, packed):
    """Not even a token whose embedding is NaN."""
    _, variables, run = windowed
    ids, segments, positions = packed
    unused = (set(range(VOCAB)) - set(ids[segments > 0].tolist())).pop()
    embedding = variables["params"]["embed"]["embedding"].at[unused].set(jnp.nan)
    poisoned = variables | {"params": variables["params"] | {"embed": {"embedding": embedding}}}
    reference = run(variables, *packed)
    other = run(poisoned, np.where(segments > 0, ids, unused), segments, positions)
    mask = segments > 0
    np.testing.assert_array_equal(np.asarray(reference.logits)[mask], other.logits[mask])
    same = lambda a, b: np.testing.assert_array_equal(a, b)
    jax.tree.map(same, (reference.terms, reference.stats), (other.terms, other.stats))
    assert np.isfinite(other.logits).all()


@pytest.mark.parametrize("unknown", [VOCAB, -1])
def test_an_id_outside_the_vocabulary_gives_nan_not_another_token(windowed, packed, unknown):
    _, variables, run = windowed
    ids, segments, positions = packed
    ids = ids.copy()
    ids[0, 1] = unknown
    logits = np.asarray(run(variables, ids, segments, positions).logits)
    assert np.isnan(logits[0, 1]).all()
    assert np.isfinite(logits[1:]).all()


@pytest.mark.slow
def test_decoding_ragged_prompts_equals_the_full_pass(windowed):
    """Prompts of 3 and 5 tokens prefilled together, then two tokens each, one at a time."""
    model, variables, run = windowed
    ids, lengths = np.asarray(tokens((2, LENGTH))), np.array([3, 5])
    ones = np.ones((2, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    full = np.asarray(run(variables, ids, ones, positions).logits)

    @quick_jit
    def decode(cache, ids, mask, positions):
        out = model.apply(
            variables | {"cache": cache},
            ids,
            segment_ids=mask.astype(jnp.int32),
            positions=positions,
            cache_length=8,
        )
        return out.logits, out.cache

    mask = positions[:, :5] < lengths[:, None]
    cache = model.init_cache(variables, 2, 8)
    logits, cache = decode(cache, np.where(mask, ids[:, :5], 0), mask, positions[:, :5])
    rows = np.arange(2)
    np.testing.assert_allclose(logits[rows, lengths - 1], full[rows, lengths - 1], atol=1e-5)
    for step in range(2):
        at = (lengths + step)[:, None]
        token = np.take_along_axis(ids, at, axis=1)
        logits, cache = decode(cache, token, np.ones((2, 1), bool), at.astype(np.int32))
        np.testing.assert_allclose(logits[:, 0], full[rows, at[:, 0]], rtol=1e-4, atol=1e-5)


def test_tied_head_embedding_scale_and_soft_cap():
    """Equal to a plain model whose head and embedding are made by hand."""
    model = dense(tied_head=True, embed_scale=0.5, logit_soft_cap=2.0)
    variables = random_model_variables(model)
    params, ids = variables["params"], tokens((1, 4))
    assert "head" not in params
    embedding = params["embed"]["embedding"]
    by_hand = {"embed": {"embedding": embedding / 2}, "head": {"kernel": embedding.T}}
    logits = quick_jit(lambda v: model.apply(v, ids).logits)(variables)
    plain = quick_jit(lambda v: dense().apply(v, ids).logits)({"params": params | by_hand})
    np.testing.assert_allclose(logits, 2 * np.tanh(plain / 2), rtol=1e-5, atol=1e-6)
    assert np.abs(plain).max() > 2


def test_bf16_compute_on_float32_parameters_is_close_to_float32():
    model = dense()
    variables = random_model_variables(model)
    ids = tokens((2, 6))
    run = lambda m: quick_jit(lambda v: m.apply(v, ids).logits)(variables)
    exact, half = run(model), run(dataclasses.replace(model, dtype="bfloat16"))
    assert half.dtype == jnp.float32
    assert 0 < np.abs(exact - half).max() < 0.1 * np.std(exact) + 0.02


def test_a_router_may_hand_a_carry_to_the_next_moe_layer():
    class Remembering(TopK):
        """Adds the logits of the MoE layers before it."""

        def initial_carry(self, num_tokens):
            return jnp.zeros((num_tokens, 4))

        def __call__(self, x, context):
            routing, _ = super().__call__(x, context)
            before = context.router_carry
            routing = dataclasses.replace(routing, extras={"before": jnp.abs(before).sum()})
            return routing, before + routing.logits

    model = tiny(
        num_layers=4,
        moe_every=2,
        dense_ffn=DenseGLU(d_ff=6),
        ffn=moe(router=Remembering(k=2), shared=None),
    )
    variables = random_model_variables(model)
    stats = quick_jit(model.apply)(variables, tokens((1, 3))).stats
    before = [float(stats[name]["before"][row]) for name, row in model.moe_layers.values()]
    assert before[0] == 0
    assert before[1] > 0
