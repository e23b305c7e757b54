"""SRP and SCH of every layer of a trace, from sequences spread evenly over it.

Both look at single sequences, and cost more than counting does: of a long trace, every n-th
sequence is looked at, and the result says how many tokens that were.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from moejax.analysis.segment_cache import segment_cache_hit_rate
from moejax.analysis.segment_routing import segment_routing, window_histogram
from moejax.analysis.trace import TraceBatch
from moejax.analysis.trace_file import TraceFile

WINDOWS = (4, 16, 64, 256)  # the paper's segment lengths, in tokens
LOOK_AHEAD = 16  # tokens that the cache sees ahead
_CACHES = (1, 2, 4)  # experts in the cache, in units of k
_ROUTING_TOKENS, _CACHE_TOKENS = 2**15, 2**11  # of each layer, at most about these


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """`srp` and `kept` `[M, L]` by window, `hit_rate` `[C, L]` by capacity of the cache.

    NaN where no sequence is as long as the window. `num_routing_tokens` and `num_cache_tokens` are
    those of the sequences looked at.
    """

    windows: tuple[int, ...]
    srp: NDArray
    kept: NDArray
    capacities: tuple[int, ...]
    hit_rate: NDArray
    num_routing_tokens: int
    num_cache_tokens: int


class SegmentCounter:
    """Adds up what `Segments` needs, batch by batch, in the order of the trace."""

    def __init__(self, trace: TraceFile):
        info = trace.info
        self._num_experts, num_layers = info.num_experts, len(info.layers)
        self._histograms = [np.zeros((num_layers, info.num_experts, m + 1)) for m in WINDOWS]
        sizes = [c * info.k for c in _CACHES]
        self._capacities = tuple(size for size in sizes if size < info.num_experts)  # E hits all
        self._hits = np.zeros((len(self._capacities), num_layers))
        self._choices = np.zeros(num_layers)
        self._every = [
            max(1, -(-trace.num_tokens // tokens)) for tokens in (_ROUTING_TOKENS, _CACHE_TOKENS)
        ]
        self._seen = self._routing_tokens = self._cache_tokens = 0

    def add(self, batch: TraceBatch) -> None:
        """The next batch."""
        for experts in batch.split(batch.experts):
            if self._seen % self._every[0] == 0:
                self._routing_tokens += experts.shape[1]
                self._add_routing(experts)
            if self._seen % self._every[1] == 0:
                self._cache_tokens += experts.shape[1]
                self._add_cache(experts)
            self._seen += 1

    def _add_routing(self, experts: NDArray) -> None:
        for window, total in zip(WINDOWS, self._histograms, strict=True):
            for layer, own in enumerate(experts):
                total[layer] += window_histogram(own, num_experts=self._num_experts, window=window)

    def _add_cache(self, experts: NDArray) -> None:
        for layer, own in enumerate(experts):
            choices = int((own < self._num_experts).sum())
            if not choices:
                continue
            self._choices[layer] += choices
            for row, capacity in enumerate(self._capacities):
                rate = segment_cache_hit_rate(
                    own, num_experts=self._num_experts, capacity=capacity, window=LOOK_AHEAD
                )
                self._hits[row, layer] += rate * choices

    def result(self) -> Segments:
        """Of all batches so far; a cache's hits and choices are added up over sequences."""
        found = [[segment_routing(layer) for layer in total] for total in self._histograms]
        rate = np.divide(
            *(self._hits, self._choices),
            out=np.full_like(self._hits, np.nan),
            where=self._choices > 0,
        )
        return Segments(
            windows=WINDOWS,
            srp=np.array([[one.srp for one in row] for row in found]),
            kept=np.array([[one.kept for one in row] for row in found]),
            capacities=self._capacities,
            hit_rate=rate,
            num_routing_tokens=self._routing_tokens,
            num_cache_tokens=self._cache_tokens,
        )
