"""Which blocks queries choose: rules that hold for any numbers, and how often the right one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from moejax.kernels.block_attention import packing
from moejax.kernels.block_attention.blocks import cut_blocks
from moejax.kernels.block_attention.selection import centroids, select
from moejax.kernels.expert_mlp.slots import sort_slots

SIZE = 8


def blocks_of(segment_ids, *, size=SIZE, offset=0, queries=None):
    segment_ids = jnp.asarray(segment_ids, jnp.int32)
    num_rows, num_keys = segment_ids.shape
    queries = queries or num_keys
    sizes = {"num_rows": num_rows, "num_keys": num_keys, "num_queries": queries}
    return cut_blocks(segment_ids, offset, block_size=size, **sizes)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


IDS = np.repeat([1, 4, 6, 0], [20, 33, 6, 5])[None]


def test_targets_are_the_full_blocks_that_a_later_query_may_choose():
    blocks = blocks_of(IDS)
    # Segments begin at 0, 20 and 53; their last blocks, full or not, are no targets.
    np.testing.assert_array_equal(blocks.first_key[0], [0, 8, 20, 28, 36, 44, 64])
    np.testing.assert_array_equal(
        blocks.own[0, [0, 19, 20, 52, 53, 58, 59]], [0, 16, 20, 52, 53, 53, -1]
    )
    reach = [
        (int(blocks.first_target[0, i]), int(blocks.end_target[0, i])) for i in (7, 8, 27, 52, 53)
    ]
    assert reach == [(0, 0), (0, 1), (2, 2), (2, 6), (6, 6)]
    assert (blocks.first_target[0, 59:] == 7).all()
    assert (blocks.end_target[0, 59:] == 0).all()
    full = blocks_of(np.ones((1, 64)))  # the last of the eight blocks is full, and no target
    np.testing.assert_array_equal(full.first_key[0], np.arange(7) * 8)


def test_keys_of_targets_and_back():
    keys = draw((64, 3))
    for blocks in (blocks_of(IDS), blocks_of(np.ones((1, 64)))):
        row = jax.tree.map(lambda x: x[0], blocks)
        there = row.of_keys(keys)
        back = row.to_keys(there)
        inside = np.zeros(64, bool)
        for j, first in enumerate(np.asarray(row.first_key)):
            if first < 64:
                np.testing.assert_array_equal(there[j], keys[first : first + SIZE])
                inside[first : first + SIZE] = True
        np.testing.assert_array_equal(back, np.where(inside[:, None], keys, 0))


@pytest.mark.parametrize("heads", ["query", "group"])
@pytest.mark.parametrize("ids", [IDS, np.ones((1, 64), int)], ids=["segments", "one segment"])
def test_choices_are_distinct_past_and_of_the_same_segment(ids, heads):
    blocks = blocks_of(ids)
    q, k = draw((1, 2, 3, 64, 4)), draw((1, 2, 64, 4), seed=1)
    chosen = np.asarray(select(q, k, blocks, num_choices=3, heads=heads))
    assert chosen.shape == (1, 2, 1 if heads == "group" else 3, 64, 3)
    none = blocks.num_targets
    for t in range(64):
        may = set(range(int(blocks.first_target[0, t]), int(blocks.end_target[0, t])))
        for row in chosen[0, :, :, t].reshape(-1, 3):
            taken = [j for j in row if j != none]
            assert len(taken) == len(set(taken)) == min(3, len(may))
            assert set(taken) <= may


def test_equal_scores_take_the_earlier_block_and_a_constant_changes_nothing():
    blocks = blocks_of(np.ones((1, 64)))
    q, k = draw((1, 1, 1, 64, 4)), draw((1, 1, 64, 4), seed=1)
    choose = functools.partial(select, blocks=blocks, num_choices=2)
    same = choose(jnp.zeros_like(q), k)
    np.testing.assert_array_equal(same[0, 0, 0, 40], [0, 1])
    # A part of every key along which every query is equal adds the same to all scores.
    q, k = (jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], -1) for x in (q, k))
    np.testing.assert_array_equal(choose(q, k), choose(q, k.at[..., -1].set(3)))


def test_aligned_keys_are_chosen_wherever_their_block_lies():
    blocks = blocks_of(np.ones((1, 64)))
    q = draw((1, 1, 1, 64, 4)).at[:].set(draw((4,), seed=3))
    noise = draw((1, 1, 64, 4), seed=1) * 0.1
    for j in range(7):
        k = noise.at[:, :, j * SIZE : (j + 1) * SIZE].set(q[0, 0, 0, 0] * 5)
        chosen = select(q, k, blocks, num_choices=1)[0, 0, 0, :, 0]
        assert (chosen[(j + 1) * SIZE :] == j).all()


def test_the_mean_has_the_dtype_of_the_keys():
    blocks = blocks_of(np.ones((1, 64)))
    k = draw((1, 2, 64, 4)).astype(jnp.bfloat16)
    mean = centroids(k, blocks)
    want = k.astype(jnp.float32).reshape(1, 2, 8, SIZE, 4)[:, :, :7].mean(3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(mean.astype(np.float32), want.astype(np.float32))


def some_targets(num_targets):
    return jnp.asarray(np.random.default_rng(0).integers(0, num_targets + 1, (40, 3)), jnp.int32)


@pytest.mark.parametrize("num_targets", [1, 6])
def test_packing_is_that_of_the_experts(num_targets):
    targets = some_targets(num_targets)
    got, want = packing.pack(targets, num_targets), sort_slots(targets, num_targets)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_targets_and_slots_that_fit_no_integer_are_sorted_apart(monkeypatch):
    asked = []

    def recorded(targets, num_targets):
        asked.append(num_targets)
        return sort_slots(targets, 6)

    monkeypatch.setattr(packing, "sort_slots", recorded)
    targets = some_targets(6)  # 120 slots
    for num_targets in (6, (2**31 - 1) // 120):
        packing.pack(targets, num_targets)
    assert asked == [(2**31 - 1) // 120]


def planted(seed, *, num_keys, width, gap, trials, within):
    """(q [trials, width], k [trials, num_keys, width]): one key is more like the query, by `gap`.

    It is among the first `within`. Queries and keys have unit length in expectation, so that a
    product of two has the variance 1 / width.
    """
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32) / np.float32(width**0.5)
    q, k = draw(trials, width), draw(trials, num_keys, width)
    towards = gap * q / (q * q).sum(1, keepdims=True)
    k[np.arange(trials), rng.integers(0, within, trials)] += towards.astype(np.float32)
    return q, k


def order_of_targets(q, k, *, size):
    """All targets of a query behind all keys, best first, `[trials, targets]`; a row per trial."""
    length = k.shape[1] + size
    k = jnp.pad(k, ((0, 0), (0, size), (0, 0)))
    sizes = {"num_rows": len(q), "num_keys": length, "num_queries": 1}
    blocks = cut_blocks(None, length - 1, block_size=size, **sizes)
    num_choices = blocks.num_targets
    return select(q[:, None, None, None], k[:, None], blocks, num_choices=num_choices)[:, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "width, size, gap", [(64, 32, 0.8), (64, 128, 1.5), (128, 32, 0.4), (128, 128, 0.8)]
)
def test_a_noise_block_wins_as_often_as_theory_says(width, size, gap):
    """Phi(-gap sqrt(d / 2B)): a score is the mean of B products, of variance 1 / d (FlashMoBA)."""
    run = jax.jit(functools.partial(order_of_targets, size=size))
    sizes = {"num_keys": 2 * size, "width": width, "gap": gap, "trials": 600, "within": size}
    won = [run(*planted(seed, **sizes))[:, 0] == 0 for seed in range(12)]
    predicted = norm.cdf(-gap * np.sqrt(width / (2 * size)))
    assert 0.05 < predicted < 0.4  # else nothing is compared
    # 7,200 trials: the standard error is below 0.006.
    np.testing.assert_allclose(1 - np.mean(won), predicted, rtol=0, atol=0.02)


@pytest.mark.slow
def test_smaller_blocks_find_more_for_the_same_number_of_keys():
    """kB = 512 of 2,048 keys."""
    recall = []
    for size in (256, 128, 64, 32):
        run = jax.jit(functools.partial(order_of_targets, size=size))
        sizes = {"num_keys": 2048, "width": 64, "gap": 2.0, "trials": 100, "within": 32}
        chosen = np.concatenate([run(*planted(seed, **sizes)) for seed in range(5)])
        recall.append((chosen[:, : 512 // size] == 0).any(1).mean())
    assert all(b > a + 0.02 for a, b in zip(recall, recall[1:], strict=False)), recall
