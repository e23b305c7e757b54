import dataclasses

import grain
import numpy as np
import pytest

from moejax.data import BestFit, DataError
from moejax.data import loader as loader_module
from moejax.data.documents import Documents
from moejax.data.loader import EvalLoader, TrainLoader
from moejax.data.pack import packed

S, B = 8, 8


def make_rows(num_docs, seed, tmp_path):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, num_docs)
    offsets = np.append(0, np.cumsum(lengths))
    tokens = (np.arange(offsets[-1] + 1) + 20000 * seed).astype(np.uint16)
    docs = Documents(tokens=tokens, offsets=offsets, num_bytes=0, fingerprint=f"{num_docs} {seed}")
    return packed(docs, BestFit(), seq_len=S, seed=0, cache_dir=str(tmp_path))


@pytest.fixture
def parts(tmp_path):
    return [make_rows(n, s, tmp_path) for s, n in ((0, 70), (1, 33))]


def make_loader(parts, seed=5, **kwargs):
    return TrainLoader(parts, weights=(0.7, 0.3), batch_size=B, seed=seed, **kwargs)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def leaves(batch):
    return [getattr(batch, f.name) for f in dataclasses.fields(batch)]


def test_a_batch_depends_on_the_step_alone(parts, monkeypatch):
    steps = range(60)
    first = make_loader(parts)
    in_order = [first.batch(t) for t in steps]
    monkeypatch.setattr(loader_module, "_BLOCK", 24)  # blocks are an implementation detail
    second = make_loader(parts)
    for t in np.random.default_rng(0).permutation(60):
        assert equal(second.batch(int(t)), in_order[t])
    with make_loader(parts).iterate(17) as batches:
        for t in range(17, 40):
            assert equal(next(batches), in_order[t])
    assert not equal(make_loader(parts, seed=6).batch(0), in_order[0])
    assert not equal(in_order[0], in_order[1])


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_shards_of_any_number_of_hosts_make_the_global_batch(parts, num_hosts):
    loader = make_loader(parts)
    held_out = EvalLoader(parts, batch_size=B)
    for make, steps in ((loader.batch, (0, 3, 1000)), (held_out.batch, range(len(held_out)))):
        for t in steps:
            shards = [leaves(make(t, (i, num_hosts))) for i in range(num_hosts)]
            assert all(x.shape == (B // num_hosts, S) for x in shards[0])
            whole = [np.concatenate(x) for x in zip(*shards, strict=True)]
            assert all(map(np.array_equal, whole, leaves(make(t))))


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_per_epoch(parts, shuffle):
    rows = parts[:1]
    loader = TrainLoader(rows, batch_size=B, seed=0, shuffle=shuffle)
    n = len(rows[0])
    assert loader.num_rows == n
    part, number = loader.rows(0, 3 * n)
    assert not part.any()
    epochs = number.reshape(3, n)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert (epochs[0] == epochs[1]).all() == (not shuffle)
    if not shuffle:
        np.testing.assert_array_equal(epochs[0], np.arange(n))
    # and the batches are made of those rows
    tokens = np.concatenate([loader.batch(t).tokens for t in range(3 * n // B)])
    expected = rows[0].batch(number[: len(tokens)]).tokens
    np.testing.assert_array_equal(tokens, expected)


def test_mixture_shares_and_epochs_per_source(parts):
    loader = make_loader(parts)
    part, number = loader.rows(0, 5000)
    assert abs((part == 1).mean() - 0.3) < 0.001
    for p, rows in enumerate(parts):
        mine = number[part == p]
        whole = mine[: len(mine) // len(rows) * len(rows)].reshape(-1, len(rows))
        np.testing.assert_array_equal(np.sort(whole, axis=1), [np.arange(len(rows))] * len(whole))
    batch = loader.batch(0)
    from_second = (batch.tokens * batch.loss_mask).max(axis=1) >= 20000
    np.testing.assert_array_equal(from_second, part[:B] == 1)


def test_is_a_grain_dataset(parts):
    dataset = make_loader(parts).dataset((1, 2))
    assert isinstance(dataset, grain.MapDataset)
    assert equal(dataset[7], make_loader(parts).batch(7, (1, 2)))
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2)))
    first = [next(iterator) for _ in range(3)]
    state = iterator.get_state()
    expected = next(iterator)
    other = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2)))
    other.set_state(state)
    assert equal(next(other), expected)
    assert equal(first[2], dataset[2])


def test_eval_has_every_token_once_and_pads_the_last_batch(parts):
    held_out = EvalLoader(parts, batch_size=B)
    batches = list(held_out)
    assert len(batches) == len(held_out) == -(-sum(map(len, parts)) // B)
    targets = np.concatenate([b.targets[b.loss_mask] for b in batches])
    expected = np.concatenate([p.documents.tokens[1:] for p in parts])
    np.testing.assert_array_equal(np.sort(targets), np.sort(expected))
    padding_rows = -sum(map(len, parts)) % B
    assert padding_rows
    assert not batches[-1].loss_mask[-padding_rows:].any()
    assert batches[-1].loss_mask[: B - padding_rows].any(axis=1).all()
    assert equal(batches[1], held_out.batch(1))


def test_bad_calls_are_errors(parts):
    loader, held_out = make_loader(parts), EvalLoader(parts, batch_size=B)
    with pytest.raises(DataError, match="8 rows cannot be shared by 3 hosts"):
        loader.batch(0, (0, 3))
    with pytest.raises(DataError, match=r"shard \(2, 2\)"):
        held_out.batch(0, (2, 2))
    with pytest.raises(IndexError, match="-1"):
        loader.batch(-1)
    with pytest.raises(IndexError):
        held_out.batch(len(held_out))
