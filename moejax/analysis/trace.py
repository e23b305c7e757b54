"""What a routing trace holds: the routing of every token of some text, without the padding.

A trace is about T tokens in N sequences. A *sequence* is what the model saw as one: a run of tokens
of one *document*, cut where the model's rows end. Padding is not in a trace, so it cannot count.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from moejax.analysis.entropy import entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """What is the same for the whole trace.

    Attributes:
      num_experts: E, routed experts of a layer; the id E is an empty slot.
      k: choices per token.
      layers: global index of every MoE layer, in order; rows of all `[L, ...]` arrays.
      sequence_length: the most tokens that the model saw at once.
      tokenizer: its fingerprint; token ids of other tokenizers do not compare.
      sources: what was read, such as file names; a sequence says which.
      documents: "texts" where documents are whole texts, or "pieces" where the data's packing
        had cut them and every piece counts as a document of its own.
      weights: where the weights came from: `folder`, `step`, and `fingerprint` of all parameters.
      config: the model's config as text.
      versions: of the libraries that ran it.
    """

    num_experts: int
    k: int
    layers: tuple[int, ...]
    sequence_length: int
    tokenizer: str
    sources: tuple[str, ...]
    documents: str
    weights: dict[str, str | int]
    config: str
    versions: dict[str, str]

    @property
    def expert_dtype(self) -> np.dtype:
        """The smallest unsigned integers that hold every expert and the empty slot."""
        return np.min_scalar_type(self.num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceBatch:
    """The routing of some sequences.

    Attributes:
      tokens: ids `[T]`, sequence after sequence.
      lengths: tokens of each sequence `[N]`; they sum to T.
      documents: of each sequence `[N]`, counted over the whole trace; never decreasing.
      sources: of each sequence `[N]`, index into `TraceInfo.sources`.
      experts: `[L, T, K]`; E is an empty slot. Exact.
      weights: combine weights `[L, T, K]`, float16: off by at most 2**-11 of themselves, or
        2**-25 where they are below 2**-14.
      sequence_probs: `[L, N, E]`, the mean of the router's probabilities over each sequence, summed
        in float64 and stored in float32.
      sequence_entropy: `[L, N]`, the mean entropy of a token's probabilities, nats, likewise.
      probs: the probabilities themselves `[L, T, E]`, float16 like `weights`, or None.
    """

    tokens: NDArray
    lengths: NDArray
    documents: NDArray
    sources: NDArray
    experts: NDArray
    weights: NDArray
    sequence_probs: NDArray
    sequence_entropy: NDArray
    probs: NDArray | None = None

    def split(self, values: NDArray) -> list[NDArray]:
        """Per-token `values` `[L, T, ...]` as one array per sequence, in order."""
        return np.split(values, np.cumsum(self.lengths)[:-1], axis=1)


def sequence_starts(segment_ids: NDArray) -> NDArray[np.int64]:
    """Where sequences begin among the real tokens of rows `[B, S]`, counted without padding.

    A sequence is a run of one segment id other than 0 within one row.
    """
    before = np.zeros_like(segment_ids)
    before[:, 1:] = segment_ids[:, :-1]
    real = segment_ids > 0
    return np.flatnonzero((segment_ids != before)[real])


def batch_of_rows(
    info: TraceInfo,
    tokens: NDArray,
    segment_ids: NDArray,
    *,
    documents: NDArray,
    sources: NDArray,
    experts: NDArray,
    weights: NDArray,
    probs: NDArray,
    keep_probs: bool = False,
) -> TraceBatch:
    """The trace of rows `[B, S]` as the model saw them; padding (segment id 0) is left out.

    Args:
      info: of the trace.
      tokens, segment_ids: `[B, S]`.
      documents, sources: `[N]`, of the sequences in row order.
      experts, weights: `[L, B * S, K]`. Ids outside `[0, E)` become the empty slot E.
      probs: `[L, B * S, E]`.
      keep_probs: whether the trace holds them, and not only their means.

    Raises:
      ValueError: a value at a real token is not finite, or too large for float16.
    """
    real = segment_ids.reshape(-1) > 0
    starts = sequence_starts(segment_ids)
    lengths = np.diff(starts, append=real.sum())
    experts, weights = experts[:, real], weights[:, real]
    used = (experts >= 0) & (experts < info.num_experts)
    mean = lambda values: np.add.reduceat(values, starts, axis=0) / lengths[:, None]
    means, entropies = [], []
    for layer in probs:  # one at a time: in float64 they are large
        exact = layer[real].astype(np.float64)
        means.append(mean(exact))
        entropies.append(mean(entropy(exact)[:, None])[:, 0])
    return TraceBatch(
        tokens=tokens.reshape(-1)[real].astype(np.int32),
        lengths=lengths.astype(np.int32),
        documents=np.asarray(documents, np.int32),
        sources=np.asarray(sources, np.int32),
        experts=np.where(used, experts, info.num_experts).astype(info.expert_dtype),
        weights=_half(weights, "combine weight"),
        sequence_probs=_finite(np.stack(means), "router probability").astype(np.float32),
        sequence_entropy=np.stack(entropies).astype(np.float32),
        probs=_half(probs[:, real], "router probability") if keep_probs else None,
    )


def _half(values: NDArray, what: str) -> NDArray:
    with np.errstate(over="ignore"):
        return _finite(values.astype(np.float16), what)


def _finite(values: NDArray, what: str) -> NDArray:
    if not np.isfinite(values).all():
        raise ValueError(f"a {what} is not finite, or beyond float16: the weights are damaged")
    return values
