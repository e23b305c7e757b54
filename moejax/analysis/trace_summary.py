"""Everything that the report shows of one trace, from one pass over the file."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from moejax.analysis.attribution import attribution
from moejax.analysis.coactivation import count_together
from moejax.analysis.expert_choices import count_choices
from moejax.analysis.routing import normalized_entropy
from moejax.analysis.trace_file import TraceFile
from moejax.analysis.trace_segments import SegmentCounter, Segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """Sums of one trace.

    Attributes:
      name: what pictures call the trace.
      trace: the file.
      counts: tokens that choose each expert, `[L, E]`.
      halves: the same of even and of odd documents, `[2, L, E]`: how much two parts of one text
        differ.
      entropy: mean entropy of a token's router distribution `[L]`, 0 to 1.
      together: tokens that choose both of two experts, `[L, E, E]`.
      attribution: mean over sequences of the mean over tokens of the router's probability,
        `[L, E]` (`attribution.attribution`).
      segments: SRP and SCH.
    """

    name: str
    trace: TraceFile
    counts: NDArray[np.int64]
    halves: NDArray[np.int64]
    entropy: NDArray
    together: NDArray[np.int64]
    attribution: NDArray
    segments: Segments


def summarise(trace: TraceFile, name: str) -> TraceSummary:
    """Reads the whole trace once, one batch in memory at a time. UserError where it is damaged."""
    num_layers, num_experts = len(trace.info.layers), trace.info.num_experts
    halves = np.zeros((2, num_layers, num_experts), np.int64)
    together = np.zeros((num_layers, num_experts, num_experts), np.int64)
    probs, entropies = np.zeros((num_layers, num_experts)), np.zeros(num_layers)
    segments = SegmentCounter(trace)
    for batch in trace.batches():
        odd = np.repeat(batch.documents % 2, batch.lengths)
        for half in (0, 1):
            halves[half] += count_choices(batch.experts[:, odd == half], num_experts)
        for layer, experts in enumerate(batch.experts):
            together[layer] += count_together(experts, num_experts)
        probs += attribution(batch.sequence_probs.transpose(1, 0, 2)) * len(batch.lengths)
        entropies += batch.sequence_entropy.astype(np.float64) @ batch.lengths
        segments.add(batch)
    return TraceSummary(
        name=name,
        trace=trace,
        counts=halves.sum(axis=0),
        halves=halves,
        entropy=np.asarray(normalized_entropy(entropies / trace.num_tokens, num_experts)),
        together=together,
        attribution=probs / trace.num_sequences,
        segments=segments.result(),
    )


def document_probs(trace: TraceFile) -> NDArray[np.float32]:
    """The mean router distribution over the tokens of every document, `[N, L, E]`.

    Sequences of one document are averaged by their lengths.
    """
    total = np.zeros((trace.num_documents, len(trace.info.layers), trace.info.num_experts))
    tokens = np.zeros(trace.num_documents)
    for batch in trace.batches():
        weighted = batch.sequence_probs.astype(np.float64) * batch.lengths[:, None]
        np.add.at(total, batch.documents, weighted.transpose(1, 0, 2))
        np.add.at(tokens, batch.documents, batch.lengths)
    return (total / tokens[:, None, None]).astype(np.float32)
