"""What the report says of a trace equals what loops over its tokens say."""

import dataclasses

import numpy as np
import pytest
from synthetic_trace import batches, trace_info, write_trace

from moejax.analysis import trace_segments
from moejax.analysis.comparison import compare
from moejax.analysis.divergence import jensen_shannon
from moejax.analysis.multilingual import divergence
from moejax.analysis.segment_cache import segment_cache_hit_rate
from moejax.analysis.segment_routing import segment_routing, window_histogram
from moejax.analysis.trace_file import TraceFile, TraceWriter
from moejax.analysis.trace_summary import document_probs, summarise
from moejax.errors import UserError

INFO = trace_info()


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return TraceFile(write_trace(tmp_path_factory.mktemp("trace") / "a.npz", INFO))


@pytest.fixture(scope="module")
def summary(trace):
    return summarise(trace, "a")


@pytest.fixture(scope="module")
def sequences():
    """(document, experts [L, S, K]) of every sequence."""
    return [
        (document, experts)
        for batch in batches(INFO)
        for document, experts in zip(batch.documents, batch.split(batch.experts), strict=True)
    ]


def test_counts_of_all_tokens_and_of_each_half(summary, sequences):
    for layer in range(3):
        for expert in range(8):
            by_half = [0, 0]
            for document, experts in sequences:
                by_half[document % 2] += (experts[layer] == expert).sum()
            assert summary.halves[:, layer, expert].tolist() == by_half
    np.testing.assert_array_equal(summary.counts, summary.halves.sum(0))
    np.testing.assert_array_equal(np.diagonal(summary.together, axis1=1, axis2=2), summary.counts)


def test_probabilities_and_entropy(summary, trace):
    parts = batches(INFO, keep_probs=True)
    probs = np.concatenate([b.probs for b in parts], axis=1).astype(np.float64)
    sequences = [own.mean(1) for b in parts for own in b.split(b.probs.astype(np.float64))]
    np.testing.assert_allclose(summary.attribution, np.mean(sequences, axis=0), atol=3e-4)
    tokens = -np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-30)), 0).sum(-1)
    np.testing.assert_allclose(summary.entropy, tokens.mean(1) / np.log(8), atol=3e-4)
    np.testing.assert_allclose(document_probs(trace), sequences, atol=3e-4)


def test_sequences_of_one_document_are_joined_by_their_lengths(tmp_path):
    (batch,) = batches(INFO, count=1, batch_size=1)
    batch = dataclasses.replace(batch, documents=np.zeros(2, np.int32))
    with TraceWriter(tmp_path / "a.npz", INFO) as writer:
        writer.add(batch)
    joined = np.average(batch.sequence_probs, axis=1, weights=batch.lengths)
    assert len(set(batch.lengths.tolist())) == 2
    np.testing.assert_allclose(document_probs(TraceFile(tmp_path / "a.npz"))[0], joined, rtol=1e-6)


def test_segments(summary, sequences):
    found = summary.segments
    assert found.windows == (4, 16, 64, 256)
    assert found.capacities == (2, 4)  # 8 is all of them
    assert found.num_routing_tokens == found.num_cache_tokens == 315
    histogram = sum(window_histogram(e[1], num_experts=8, window=4) for _, e in sequences)
    known = segment_routing(histogram)
    assert (found.srp[0, 1], found.kept[0, 1]) == (known.srp, known.kept)
    assert np.isnan(found.srp[2:]).all()  # no sequence is as long
    hits = choices = 0
    for _, experts in sequences:
        own = int((experts[0] < 8).sum())
        rate = segment_cache_hit_rate(experts[0], num_experts=8, capacity=4, window=16)
        hits, choices = hits + rate * own, choices + own
    assert found.hit_rate[1, 0] == pytest.approx(hits / choices)


def test_of_a_long_trace_sequences_are_spread_over_it(trace, monkeypatch):
    monkeypatch.setattr(trace_segments, "_ROUTING_TOKENS", 105)
    monkeypatch.setattr(trace_segments, "_CACHE_TOKENS", 1)
    lengths = np.concatenate([b.lengths for b in batches(INFO)])
    found = summarise(trace, "a").segments
    assert found.num_routing_tokens == lengths[::3].sum()
    assert found.num_cache_tokens == lengths[0]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = write_trace(tmp_path_factory.mktemp("trace") / "b.npz", INFO, seed=5)
    return summarise(TraceFile(path), "b")


def test_a_comparison(summary, other):
    found = compare(summary, other, paired=True)
    np.testing.assert_array_equal(found.jsd, jensen_shannon(summary.counts, other.counts))
    np.testing.assert_array_equal(found.floors[1], jensen_shannon(*other.halves))
    np.testing.assert_allclose(found.shift[2], (other.counts - summary.counts)[2] / 315)
    q = [document_probs(s.trace) for s in (summary, other)]
    pairs = [[divergence(q[0][n, r], q[1][n, r]) for r in range(3)] for n in range(18)]
    np.testing.assert_allclose(found.pairs, np.mean(pairs, axis=0))
    assert found.same_weights
    assert compare(summary, other).pairs is None
    assert (compare(summary, summary, paired=True).pairs == 0).all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"num_experts": 9}, {}, r"different models \(num_experts: 8 and 9\)"),
        ({"tokenizer": "another"}, {}, "tokenizer: of bytes and another"),
        ({"layers": (0, 1, 2)}, {}, r"layers: \(1, 2, 4\) and \(0, 1, 2\)"),
        ({"documents": "pieces"}, {}, "are pieces of training rows"),
        ({}, {"count": 2}, "has 18 documents and .* has 12: pairs need as many"),
    ],
)
def test_what_does_not_compare_is_refused(summary, tmp_path, changes, options, message):
    path = write_trace(tmp_path / "b.npz", trace_info(**changes), **options)
    with pytest.raises(UserError, match=message):
        compare(summary, summarise(TraceFile(path), "b"), paired=True)
