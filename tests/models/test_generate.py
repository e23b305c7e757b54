"""Sampling: greedy equals arg-max of the full pass; draws depend on the seed and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.mla import MultiHeadLatentAttention
from moejax.errors import UserError
from moejax.models.generate import Sampling, _nucleus, generate
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import (
    VOCAB,
    attention,
    dense,
    moe,
    random_model_variables,
    tiny,
    tokens,
)

PROMPTS = [np.array([3, 1, 4, 1]), np.array([5])]
RANDOM = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9)


@pytest.fixture(scope="module")
def quick():
    model = dense()
    return model, random_model_variables(model)


LATENT = MultiHeadLatentAttention(
    num_heads=4, kv_lora_rank=6, nope_head_dim=4, rope_head_dim=2, v_head_dim=3
)


@pytest.mark.slow
@pytest.mark.parametrize("method", [attention(), LATENT], ids=["full", "latent"])
def test_greedy_is_the_argmax_of_the_full_pass(method):
    model = tiny(num_layers=1, windows=(3,), ffn=moe(shared=None), attention=method)
    variables = random_model_variables(model)
    full = quick_jit(lambda v, t: model.apply(v, t).logits)
    prompts = [np.asarray(tokens((1 + i % 3,), seed=i)) for i in range(8)]
    new = generate(model, variables, prompts, Sampling(max_new_tokens=6, temperature=0.0))
    for prompt, continuation in zip(prompts, new, strict=True):
        whole = np.concatenate([prompt, continuation])
        whole = np.pad(whole, (0, 9 - len(whole)))[None]
        expected = np.argmax(full(variables, whole)[0], axis=-1)[len(prompt) - 1 :][:6]
        np.testing.assert_array_equal(continuation, expected)


def test_draws_depend_on_the_seed_and_not_on_the_other_prompts(quick):
    one = generate(*quick, PROMPTS, RANDOM, seed=1)
    np.testing.assert_array_equal(one, generate(*quick, PROMPTS, RANDOM, seed=1))
    assert (np.asarray(one) != generate(*quick, PROMPTS, RANDOM, seed=2)).any()
    others = [PROMPTS[0], np.array([7, 8, 9, 10])]
    np.testing.assert_array_equal(one[0], generate(*quick, others, RANDOM, seed=1)[0])
    assert (one[0] != one[1]).any()


def test_every_token_is_a_draw_of_its_own(quick):
    """With a head of zeros all logits are equal: one key for every step would repeat one token."""
    model, variables = quick
    head = jax.tree.map(jnp.zeros_like, variables["params"]["head"])
    flat = variables | {"params": variables["params"] | {"head": head}}
    for row in generate(model, flat, PROMPTS, RANDOM, seed=1):
        assert len(set(row.tolist())) > 4


def test_a_tiny_top_p_is_greedy(quick):
    greedy = generate(*quick, PROMPTS, Sampling(max_new_tokens=12, temperature=0.0))
    narrow = Sampling(max_new_tokens=12, temperature=1.0, top_p=1e-6)
    np.testing.assert_array_equal(generate(*quick, PROMPTS, narrow), greedy)


def test_the_stop_id_and_what_follows_is_cut(quick):
    whole = generate(*quick, PROMPTS, RANDOM, seed=1)
    stop = int(whole[0][5])
    cut = generate(*quick, PROMPTS, RANDOM, seed=1, stop_id=stop)
    first = int(np.argmax(whole[0] == stop))
    np.testing.assert_array_equal(cut[0], whole[0][:first])
    never = next(i for i in range(VOCAB) if i not in np.concatenate(whole))
    uncut = generate(*quick, PROMPTS, RANDOM, seed=1, stop_id=never)
    np.testing.assert_array_equal(np.asarray(uncut), whole)


def test_one_new_token(quick):
    new = generate(*quick, PROMPTS, Sampling(max_new_tokens=1, temperature=0.0))
    assert [len(row) for row in new] == [1, 1]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.05, 0.35]]))
    kept = lambda top_p: np.isfinite(_nucleus(logits, top_p))[0].tolist()
    assert kept(0.4) == [False, True, False, False]
    assert kept(0.6) == [False, True, False, True]
    assert kept(0.9) == [True, True, False, True]
    assert kept(1.0) == [True] * 4


def test_draws_follow_the_distribution():
    """Temperature 2 halves the logits: frequencies over many rows match their softmax."""
    model = dense()
    variables = random_model_variables(model)
    prompts = [np.array([3])] * 800
    sampling = Sampling(max_new_tokens=1, temperature=2.0, top_p=1.0)
    drawn = np.concatenate(generate(model, variables, prompts, sampling))
    logits = quick_jit(lambda v: model.apply(v, jnp.array([[3]])).logits)(variables)[0, 0]
    expected = np.asarray(jax.nn.softmax(logits / 2))
    frequency = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert np.abs(frequency - expected).max() < 4 * np.sqrt(0.25 / len(drawn))


def test_the_coldest_temperature_is_greedy(quick):
    model, variables = quick
    far = jax.tree.map(lambda leaf: 1e6 * leaf, variables["params"]["head"])
    loud = variables | {"params": variables["params"] | {"head": far}}
    greedy = generate(model, loud, PROMPTS, Sampling(max_new_tokens=12, temperature=0.0))
    cold = Sampling(max_new_tokens=12, temperature=1e-6, top_p=1.0)
    np.testing.assert_array_equal(generate(model, loud, PROMPTS, cold), greedy)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_decide_nothing_are_refused_where_they_are_used(quick, temperature):
    """A token with a NaN embedding, which the second prompt holds or the first one draws."""
    model, variables = quick
    sampling = Sampling(max_new_tokens=12, temperature=temperature)
    new = generate(model, variables, PROMPTS, sampling)
    embedding = variables["params"]["embed"]["embedding"]
    with_nan = lambda token: (
        variables
        | {
            "params": variables["params"]
            | {"embed": {"embedding": embedding.at[token].set(jnp.nan)}}
        }
    )
    with pytest.raises(UserError, match="prompt 2 of 2 cannot .* its new token 1 are NaN"):
        generate(model, with_nan(5), PROMPTS, sampling)
    drawn = next(int(t) for t in new[0] if t not in np.concatenate(PROMPTS))
    at = new[0].tolist().index(drawn)
    with pytest.raises(UserError, match=f"prompt 1 of 1 .* new token {at + 2} are NaN"):
        generate(model, with_nan(drawn), PROMPTS[:1], sampling)
    # What comes behind the stop id is drawn, but not used.
    cut = generate(model, with_nan(drawn), PROMPTS[:1], sampling, stop_id=drawn)
    np.testing.assert_array_equal(cut[0], new[0][:at])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_bias_without_end(value):
    """-inf forbids a token; +inf makes every probability NaN."""
    model = dense(head_bias=True)
    variables = random_model_variables(model)
    head = variables["params"]["head"]
    head = head | {"bias": jnp.zeros_like(head["bias"]).at[3].set(value)}
    endless = variables | {"params": variables["params"] | {"head": head}}
    if value > 0:
        with pytest.raises(UserError, match="prompt 1 of 2 .* NaN or infinite"):
            generate(model, endless, PROMPTS, RANDOM)
    else:
        assert 3 not in np.concatenate(generate(model, endless, PROMPTS, RANDOM))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be 0 or more, and finite"),
        ({"temperature": float("inf")}, "temperature=inf must be 0 or more, and finite"),
        ({"temperature": 1e-40}, "temperature=1e-40 is too small .* give 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_bad_options_are_one_clear_sentence(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_bad_prompts_are_one_clear_sentence(quick):
    for prompts in ([], [np.array([1]), np.array([], int)]):
        with pytest.raises(UserError, match="every prompt at least one token"):
            generate(*quick, prompts, RANDOM)
    with pytest.raises(UserError, match="ids from 1 to 24; the model knows 0 to 23"):
        generate(*quick, [np.array([1, VOCAB])], RANDOM)
    model = dense(max_length=8)
    with pytest.raises(UserError, match="13 tokens is longer than model.max_length=8"):
        generate(model, quick[1], [tokens((1,))], RANDOM)


def test_a_prompt_draws_by_its_number(quick):
    """So that a second batch of the same prompts gives other texts, and a single one the same."""
    model, variables = quick
    prompts, sampling = [np.array([3, 4])] * 4, Sampling(max_new_tokens=8, temperature=1.0)
    first = generate(model, variables, prompts, sampling, seed=1)
    again = generate(model, variables, prompts, sampling, seed=1, numbers=[4, 5, 6, 1])
    np.testing.assert_array_equal(again[3], first[1])
    texts = {tuple(ids.tolist()) for ids in (*first, *again)}
    assert len(texts) == 7
