import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import BestFit, ConcatChunk, pack
from moejax.data.documents import Documents
from moejax.data.pack import best_fit_bins, packed

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SEQ_LEN = st.integers(2, 16)


def check(pieces, lengths, seq_len):
    """Each prediction of each document is in exactly one piece, and no row is too full."""
    seen = np.zeros((len(lengths), max(lengths)), int)
    for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True):
        assert n >= 1
        seen[d, s : s + n] += 1
        assert s + n <= lengths[d]
    expected = np.arange(max(lengths)) < np.array(lengths)[:, None]
    np.testing.assert_array_equal(seen, expected)
    assert (np.diff(pieces.row) >= 0).all()
    used = np.bincount(pieces.row, weights=pieces.length)
    assert used.min() >= 1
    assert used.max() <= seq_len


@given(lengths=LENGTHS, seq_len=SEQ_LEN)
@settings(max_examples=200, deadline=None)
def test_concat_chunk(lengths, seq_len):
    pieces = ConcatChunk().pack(np.array(lengths), seq_len)
    check(pieces, lengths, seq_len)
    used = np.bincount(pieces.row, weights=pieces.length)
    assert (used[:-1] == seq_len).all()
    np.testing.assert_array_equal(np.sort(pieces.document), pieces.document)


@given(lengths=LENGTHS, seq_len=SEQ_LEN)
@settings(max_examples=200, deadline=None)
def test_best_fit(lengths, seq_len):
    pieces = BestFit().pack(np.array(lengths), seq_len)
    check(pieces, lengths, seq_len)
    counts = np.bincount(pieces.document)
    # Never cut more often than the row length demands: what fits stays whole.
    np.testing.assert_array_equal(counts, -(-np.array(lengths) // seq_len))
    firsts = pieces.document[np.flatnonzero(np.diff(pieces.row, prepend=-1))]
    assert (np.diff(firsts) >= 0).all()  # an unshuffled pass follows the source


def simple_best_fit(sizes, capacity):
    """One item at a time; returns the sorted fill of the bins."""
    spaces = []
    for size in sorted(sizes, reverse=True):
        at = bisect.bisect_left(spaces, size)
        space = spaces.pop(at) if at < len(spaces) else capacity
        bisect.insort(spaces, space - size)
    return sorted(capacity - s for s in spaces)


@given(data=st.data(), capacity=st.integers(1, 24))
@settings(max_examples=300, deadline=None)
def test_best_fit_is_the_sequential_algorithm(data, capacity):
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=80))
    bins = best_fit_bins(np.array(sizes), capacity)
    fill = np.bincount(bins, weights=sizes).astype(int)
    assert sorted(fill.tolist()) == simple_best_fit(sizes, capacity)


def test_best_fit_of_a_million_pieces_is_fast_and_full():
    sizes = np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64) + 1
    sizes = np.minimum(sizes, 2048)
    bins = best_fit_bins(sizes, 2048)
    fill = np.bincount(bins, weights=sizes)
    assert fill.max() <= 2048
    assert fill.mean() / 2048 > 0.999


def make_documents(lengths):
    offsets = np.append(0, np.cumsum(lengths))
    tokens = np.arange(offsets[-1] + 1, dtype=np.uint16)
    return Documents(tokens=tokens, offsets=offsets, num_bytes=0, fingerprint="made up")


@pytest.mark.parametrize("packing", [BestFit(), ConcatChunk()])
def test_index_is_kept_and_depends_on_everything(packing, tmp_path):
    docs = make_documents([5, 3, 9, 1, 30, 2])

    def rows(seq_len=8, seed=0):
        return packed(docs, packing, seq_len=seq_len, seed=seed, cache_dir=str(tmp_path))

    first = rows()
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    again = rows()
    np.testing.assert_array_equal(first.begin, again.begin)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")} == written
    assert len({rows().fingerprint, rows(9).fingerprint, rows(seed=1).fingerprint,
                rows(seed=None).fingerprint}) == 4  # fmt: skip
    other = BestFit() if packing == ConcatChunk() else ConcatChunk()
    assert packed(
        docs, other, seq_len=8, seed=0, cache_dir=str(tmp_path)
    ).fingerprint != first.fingerprint  # fmt: skip


def test_the_seed_shuffles_documents(tmp_path):
    docs = make_documents([4] * 50)
    packs = [
        packed(docs, ConcatChunk(), seq_len=8, seed=s, cache_dir=str(tmp_path)).begin.tolist()
        for s in (None, 0, 1)
    ]
    assert packs[0] == sorted(packs[0])
    assert packs[1] != packs[0] != packs[2] != packs[1]
    assert sorted(packs[1]) == packs[0]


def test_efficiency(tmp_path):
    docs = make_documents([6, 6, 6])
    best = packed(docs, BestFit(), seq_len=8, seed=None, cache_dir=str(tmp_path))
    chunk = packed(docs, ConcatChunk(), seq_len=8, seed=None, cache_dir=str(tmp_path))
    assert (len(best), best.efficiency) == (3, 0.75)
    assert (len(chunk), chunk.efficiency) == (3, 0.75)
    chunk = packed(docs, ConcatChunk(), seq_len=9, seed=None, cache_dir=str(tmp_path))
    assert (len(chunk), chunk.efficiency) == (2, 1.0)


def test_rows_of_another_class_of_the_same_name_are_not_taken(tmp_path):
    class BestFit(ConcatChunk):
        """Packs in another way than the one that it is named after."""

    docs = make_documents([16] * 3)
    sizes = {"seq_len": 10, "seed": None, "cache_dir": str(tmp_path)}
    assert len(packed(docs, pack.BestFit(), **sizes)) == 6
    assert len(packed(docs, BestFit(), **sizes)) == 5
