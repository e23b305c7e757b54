"""Text to requests, by the conventions of EleutherAI's lm-evaluation-harness (0.4.13).

Facts from its `api/model.py` (`_encode_pair`, `loglikelihood`), `utils.py`
(`get_rolling_token_windows`) and `models/huggingface.py` (`tok_encode`, `prefix_token_id`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.evaluation.likelihood import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How text becomes tokens for a model.

    Attributes:
      tokenizer: the model's.
      beginning: ids in front of every text. A run of moejax has seen its end token there; for a
        published model it is what its tokenizer puts there, often nothing.
      start: the id that stands for an empty context, and begins a document.
    """

    tokenizer: Tokenizer
    beginning: tuple[int, ...]
    start: int

    @property
    def first(self) -> tuple[int, ...]:
        """The ids in front of a document that is to be continued: at least one."""
        return self.beginning or (self.start,)

    def encode(self, text: str) -> np.ndarray:
        """int32 ids [n] with the beginning, unless the text spells it itself.

        Special tokens that the text spells are those tokens: a chat template may have written it.
        """
        ids = self.tokenizer.encode_marked(text)
        given = np.array(self.beginning, np.int32)
        if len(given) and np.array_equal(ids[: len(given)], given):
            return ids
        return np.concatenate([given, ids])

    def pair(self, context: str, continuation: str) -> Request:
        """The continuation, to be scored given the context.

        Blanks at the context's end go to the continuation. Both are tokenised as one text, and
        the continuation is what follows as many tokens as the context has on its own.

        Raises UserError where that is nothing.
        """
        if not context:
            ids = self.tokenizer.encode_marked(continuation)
            if len(ids) > 1 and ids[0] == self.start:
                return Request(ids[:1], ids[1:])
            if not len(ids):
                raise UserError("a continuation without text cannot be scored: remove it")
            return Request(np.array([self.start], np.int32), ids)
        end = len(context.rstrip())
        context, continuation = context[:end], context[end:] + continuation
        whole, before = self.encode(context + continuation), self.encode(context)
        if len(whole) <= len(before):
            raise UserError(
                f"the continuation {continuation!r} adds no token to its context: make it longer"
            )
        if not len(before):  # the context was blank, and all of it went to the continuation
            before = np.array([self.start], np.int32)
            return Request(before, whole)
        return Request(before, whole[len(before) :])

    def windows(self, text: str, *, length: int, stride: int) -> Iterator[Request]:
        """The text as a document: requests that score every token once, the first included.

        The first window scores up to `length` tokens behind the start; each later one the next
        `stride`, given as much before them as fits into `length` inputs. A stride of `length`
        leaves one token of context at a window's beginning, as the harness does. Empty text
        gives no request. Special tokens that it spells are text.
        """
        ids = self.tokenizer.encode(text)
        begin = np.array([self.start], np.int32)
        if len(ids):
            yield Request(begin, ids[:length])
        for at in range(length, len(ids), stride):
            end = min(at + stride, len(ids))
            yield Request(ids[end - length - 1 : at], ids[at:end])
