"""Two routing traces of one kind of model side by side: per layer, and per sentence pair."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from moejax.analysis import multilingual
from moejax.analysis.divergence import jensen_shannon
from moejax.analysis.expert_choices import activation_share
from moejax.analysis.trace_summary import TraceSummary, document_probs
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How `other` is routed, against `first`.

    Attributes:
      first, other: the traces.
      jsd: Jensen-Shannon divergence of the choices, `[L]`, nats.
      floors: the same between even and odd documents of `first` and of `other`, `[2, L]`: what two
        parts of one text differ by. NaN where a trace is of one document.
      shift: `f_k(other) - f_k(first)`, share of tokens that activate each expert, `[L, E]`.
      pairs: the mean over sentence pairs of the normalised divergence, `[L]`; None where the
        documents are no translations of each other.
    """

    first: TraceSummary
    other: TraceSummary
    jsd: NDArray
    floors: NDArray
    shift: NDArray
    pairs: NDArray | None

    @property
    def same_weights(self) -> bool:
        """Whether both traces are of the same parameters, bit for bit."""
        one, two = (s.trace.info.weights.get("fingerprint") for s in (self.first, self.other))
        return one == two


def compare(first: TraceSummary, other: TraceSummary, *, paired: bool = False) -> Comparison:
    """Compares two traces; `paired` says that document n of both is the same sentence.

    Raises:
      UserError: the models have other layers, experts or tokenizers; or `paired` documents are
        pieces, or not equally many.
    """
    _check(first, other, paired)
    shares = [activation_share(s.counts, s.trace.num_tokens) for s in (first, other)]
    pairs = None
    if paired:
        both = [document_probs(s.trace) for s in (first, other)]
        pairs = multilingual.mean_divergence(*both)
    return Comparison(
        first=first,
        other=other,
        jsd=np.asarray(jensen_shannon(first.counts, other.counts)),
        floors=np.stack([np.asarray(jensen_shannon(*s.halves)) for s in (first, other)]),
        shift=shares[1] - shares[0],
        pairs=pairs,
    )


def _check(first: TraceSummary, other: TraceSummary, paired: bool) -> None:
    one, two = first.trace, other.trace
    for what in ("layers", "num_experts", "k", "tokenizer"):
        a, b = getattr(one.info, what), getattr(two.info, what)
        if a != b:
            raise UserError(
                f"{one.path} and {two.path} are of different models ({what}: {a} and {b}): "
                "compare traces of one model, or of one model before and after tuning"
            )
    if not paired:
        return
    for trace in (one, two):
        if trace.info.documents != "texts":
            raise UserError(
                f"the documents of {trace.path} are pieces of training rows, which pair with "
                "nothing: trace translations with --text and --lines"
            )
    if one.num_documents != two.num_documents:
        raise UserError(
            f"{one.path} has {one.num_documents} documents and {two.path} has "
            f"{two.num_documents}: pairs need as many sentences on both sides"
        )
