import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import BestFit, ConcatChunk
from moejax.data.documents import Documents
from moejax.data.pack import packed
from moejax.data.rows import PADDING, mixed_batch

EOS = 0


def make_documents(lengths, name="", scored=None):
    """Document i is (i + 1) * 100 + 1, + 2, ...: every token says where it belongs."""
    stream, offsets = [EOS], [0]
    for i, n in enumerate(lengths):
        stream += [(i + 1) * 100 + j + 1 for j in range(n - 1)] + [EOS]
        offsets.append(offsets[-1] + n)
    return Documents(
        tokens=np.array(stream, np.uint16),
        offsets=np.array(offsets),
        num_bytes=0,
        fingerprint=f"{lengths}{name}",
        scored=scored,
    )


def naive_row(rows, number):
    """The row by plain loops over its pieces."""
    tokens = rows.documents.tokens
    out = []
    for segment, p in enumerate(range(rows.first[number], rows.first[number + 1]), 1):
        for j in range(rows.length[p]):
            at = rows.begin[p] + j
            out.append((tokens[at], tokens[at + 1], True, segment, j))
    out += [(0, 0, False, 0, 0)] * (rows.seq_len - len(out))
    return np.array(out).T


def fields(batch):
    return np.stack(
        [batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids, batch.positions]
    ).astype(int)


@pytest.mark.parametrize("packing", [BestFit(), ConcatChunk()])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), seq_len=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_batches_are_the_rows_with_every_token_once(packing, lengths, seq_len, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("rows"))
    docs = make_documents(lengths)
    rows = packed(docs, packing, seq_len=seq_len, seed=3, cache_dir=cache)
    batch = rows.batch(np.arange(len(rows))[::-1])
    got = fields(batch)
    for b, number in enumerate(reversed(range(len(rows)))):
        np.testing.assert_array_equal(got[:, b], naive_row(rows, number))
    targets = batch.targets[batch.loss_mask]
    np.testing.assert_array_equal(np.sort(targets), np.sort(docs.tokens[1:]))
    check_contract(batch)


def check_contract(batch):
    np.testing.assert_array_equal(batch.loss_mask, batch.segment_ids != 0)
    for field in (batch.tokens, batch.targets, batch.segment_ids, batch.positions):
        assert field.dtype == np.int32
    assert batch.loss_mask.dtype == bool
    tokens, targets, segments, positions = (
        batch.tokens, batch.targets, batch.segment_ids, batch.positions
    )  # fmt: skip
    same = segments[:, 1:] == segments[:, :-1]
    real = segments[:, 1:] > 0
    # within a segment the target is the next token and positions count up
    np.testing.assert_array_equal(targets[:, :-1][same & real], tokens[:, 1:][same & real])
    np.testing.assert_array_equal(positions[:, 1:][same & real], positions[:, :-1][same & real] + 1)
    # where a segment begins positions restart and segment ids go up by one
    np.testing.assert_array_equal(positions[:, 0], 0)
    np.testing.assert_array_equal(positions[:, 1:][~same], 0)
    np.testing.assert_array_equal(segments[:, 1:][~same & real], segments[:, :-1][~same & real] + 1)
    # no target belongs to another document than its input
    document = np.where(tokens == EOS, targets, tokens) // 100
    inside = (targets != EOS) & (segments > 0)
    np.testing.assert_array_equal((targets // 100)[inside], document[inside])


def test_padding_rows(tmp_path):
    rows = packed(make_documents([5, 8]), BestFit(), seq_len=8, seed=None, cache_dir=str(tmp_path))
    batch = rows.batch(np.array([PADDING, 1, PADDING, 0]))
    got = fields(batch)
    assert not got[:, [0, 2]].any()
    np.testing.assert_array_equal(got[:, 1], naive_row(rows, 1))
    np.testing.assert_array_equal(got[:, 3], naive_row(rows, 0))
    assert not fields(rows.batch(np.array([PADDING, PADDING]))).any()
    np.testing.assert_array_equal(fields(rows.row(0))[:, 0], naive_row(rows, 0))


def test_mixed_batch_takes_each_row_from_its_part(tmp_path):
    parts = [
        packed(make_documents(n, str(n)), BestFit(), seq_len=8, seed=None, cache_dir=str(tmp_path))
        for n in ([5, 8, 3, 20], [7, 7, 1])
    ]
    part, number = np.array([0, 1, 1, 0, 1]), np.array([1, 0, 1, 3, PADDING])
    got = fields(mixed_batch(parts, part, number))
    for b in range(4):
        np.testing.assert_array_equal(got[:, b], naive_row(parts[part[b]], number[b]))
    assert not got[:, 4].any()


def test_documents_apart_are_whole_in_order_and_one_to_a_row(tmp_path):
    lengths = [4, 9, 2, 6]
    scored = np.random.default_rng(0).random(sum(lengths) + 1) < 0.5
    docs = make_documents(lengths, scored=scored)
    rows = packed(docs, BestFit(), seq_len=6, seed=1, cache_dir=str(tmp_path)).apart()
    batch = rows.batch(np.arange(len(rows)))
    for row, (number, length) in enumerate([(0, 4), (2, 2), (3, 6)]):
        begin = docs.offsets[number]
        np.testing.assert_array_equal(batch.tokens[row, :length], docs.tokens[begin:][:length])
        expected = np.zeros(6, bool)
        expected[:length] = scored[begin + 1 :][:length]
        np.testing.assert_array_equal(batch.loss_mask[row], expected)
        assert (batch.segment_ids[row] == (np.arange(6) < length)).all()
    assert rows.num_scored == batch.loss_mask.sum()


def test_a_batch_of_a_mixture_says_which_source_each_row_is_from(tmp_path):
    parts = [
        packed(make_documents(lengths), BestFit(), seq_len=6, seed=None, cache_dir=str(tmp_path))
        for lengths in ([5, 4, 6], [3, 2])
    ]
    assert parts[0].batch(np.array([0])).sources is None
    batch = mixed_batch(parts, np.array([1, 0, 0]), np.array([0, 2, PADDING]))
    np.testing.assert_array_equal(batch.sources, np.repeat([[1], [0], [0]], 6, axis=1))
