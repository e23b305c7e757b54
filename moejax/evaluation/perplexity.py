"""Perplexity, bits per byte and bits per token of text files, each a document on its own."""

from __future__ import annotations

import dataclasses
import logging
import math
import pathlib
from collections.abc import Sequence

from moejax.errors import UserError
from moejax.evaluation.likelihood import Scorer
from moejax.evaluation.reading import Reading

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """A text's log-likelihood in nats, and its sizes; figures of several add up."""

    log_prob: float
    num_tokens: int
    num_bytes: int

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(
            log_prob=self.log_prob + other.log_prob,
            num_tokens=self.num_tokens + other.num_tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    def figures(self) -> dict[str, float]:
        """Perplexities are exp(nats per ...); bits are nats / ln 2."""
        bits = -self.log_prob / math.log(2)
        return {
            "perplexity per token": math.exp(-self.log_prob / self.num_tokens),
            "bits per token": bits / self.num_tokens,
            "bits per byte": bits / self.num_bytes,
        }


def score_texts(
    scorer: Scorer, reading: Reading, texts: Sequence[str], *, stride: int | None = None
) -> list[TextScore]:
    """One score per text. Every token counts once, the first included; the document's end does not.

    Args:
      scorer: its `max_length` is the window.
      reading: of the model.
      texts: none empty.
      stride: tokens scored per window after the first; None is a whole window (see
        `Reading.windows`).

    Raises UserError for an empty text, or a stride outside [1, max_length].
    """
    length = scorer.max_length
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UserError(f"a stride of {stride} tokens is not between 1 and the length, {length}")
    _check_kept(reading, texts)
    requests = [list(reading.windows(text, length=length, stride=stride)) for text in texts]
    if not all(requests):
        raise UserError("an empty text has no perplexity: leave it out")
    scores = iter(scorer([request for own in requests for request in own]))
    return [
        TextScore(
            log_prob=math.fsum(next(scores).log_prob for _ in own),
            num_tokens=sum(len(request.target) for request in own),
            num_bytes=len(text.encode()),
        )
        for text, own in zip(texts, requests, strict=True)
    ]


def _check_kept(reading: Reading, texts: Sequence[str]) -> None:
    """Warns where tokens leave out text: it would make bits per byte small."""
    size_of = reading.tokenizer.token_bytes()
    kept = sum(int(size_of[ids].sum()) for ids in reading.tokenizer.encode_batch(texts))
    given = sum(len(text.encode()) for text in texts)
    if kept < given:
        _log.warning(
            "the tokenizer keeps %d of the %d bytes of text: what it leaves out is not scored, and "
            "bits per byte are too few", kept, given,
        )  # fmt: skip


def read_text(path: str) -> str:
    """A UTF-8 file with its line ends as they are. Raises UserError where it is none, or empty."""
    try:
        text = pathlib.Path(path).expanduser().read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from error
    if not text:
        raise UserError(f"{path} is empty: leave it out")
    return text
