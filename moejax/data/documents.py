"""Tokenised documents on disk: one flat stream of tokens, made once per source and tokenizer.

The stream is `eos d0 eos d1 eos d2 eos ...`. *Prediction* p has input `tokens[p]` and target
`tokens[p + 1]`; document i owns the predictions `offsets[i]` to `offsets[i + 1]`, whose inputs
are `eos` and the document's tokens, and whose targets are its tokens and `eos`. So every byte of
every document is a target exactly once, and bits per byte needs no correction.

Of pairs and conversations (`dialogue.py`) only some tokens are scored: `scored` says which, token
by token, and a prediction counts if its *target* is scored.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moejax.data import dialogue
from moejax.data.cache import ArrayWriter, open_or_build
from moejax.data.dialogue import Dialogue
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint
from moejax.data.source import Source
from moejax.data.token_arrays import TokenArrays
from moejax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # part of every fingerprint: raise it when the layout below changes
_ENCODE_BYTES = 4 * 2**20  # text handed to the tokenizer at a time; it uses all cores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """One split of one source, tokenised.

    Attributes:
      tokens: uint16 or uint32 [N + 1], the stream; memory-mapped.
      offsets: int64 [num documents + 1], the first prediction of each document, and N.
      num_bytes: UTF-8 bytes of the documents' text, or of what of it is scored.
      fingerprint: of source, split and tokenizer, and of the chat template for dialogues.
      scored: bool [N + 1], which tokens count as targets; None where all do.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    num_bytes: int
    fingerprint: str
    scored: np.ndarray | None = None

    @property
    def num_predictions(self) -> int:
        return int(self.offsets[-1])


def tokenized(source: Source, split: str, tokenizer: Tokenizer, cache_dir: str) -> Documents:
    """The split's documents from the cache folder, tokenised now if they are not there.

    Raises:
      DataError: the source is missing, empty, or made by another tokenizer, a token id is
        outside the vocabulary, a document holds the end token, a dialogue has no layout, or the
        cache folder cannot be written.
    """
    _check_tokenizer(source, tokenizer)
    parts = ["documents", FORMAT, source.fingerprint(split), split, tokenizer.fingerprint()]
    if _has_dialogues(source):
        parts.append(dialogue.chat_fingerprint(tokenizer))
    key = fingerprint(*parts)
    arrays, info = open_or_build(
        pathlib.Path(cache_dir) / "documents" / key,
        key,
        lambda writer: _tokenize(source, split, tokenizer, writer),
        what=f"the token cache of {type(source).__name__} ({split})",
    )
    return Documents(**arrays, num_bytes=info["num_bytes"], fingerprint=key)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    if vocab_size > 2**31 - 1:
        raise DataError(f"vocab_size={vocab_size} does not fit the int32 of a batch")
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    if not isinstance(source, TokenArrays):
        return
    made_by = source.manifest().get("tokenizer")
    if made_by is not None and made_by != tokenizer.fingerprint():
        raise DataError(
            f"the token arrays in {source.path!r} were made by another tokenizer than "
            "data.tokenizer: set data.tokenizer to the one that made them"
        )


def _has_dialogues(source: Source) -> bool:
    return getattr(source, "dialogues", False)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Some documents in order, tokenised: ids [n] each; scored [n + 1] each, with the end token."""

    ids: list[np.ndarray]
    num_bytes: int | None  # of what is scored of their text; None counts the tokens' bytes
    scored: list[np.ndarray] | None = None


def _tokenize(source: Source, split: str, tokenizer: Tokenizer, writer: ArrayWriter) -> dict:
    started = time.monotonic()
    dtype = token_dtype(tokenizer.vocab_size)
    size_of, eos = tokenizer.token_bytes(), tokenizer.eos_id
    writer.append("tokens", np.array([eos], dtype))
    writer.append("offsets", np.zeros(1, np.int64))
    if _has_dialogues(source):
        writer.append("scored", np.zeros(1, bool))
    end = num_bytes = token_bytes = 0
    for group in _groups(source, split, tokenizer):
        if not _has_dialogues(source):
            _check_ends(group.ids, eos, source)
        lengths = np.array([len(ids) + 1 for ids in group.ids], np.int64)
        ids = np.concatenate([part for doc in group.ids for part in (doc, [eos])])
        _check_range(ids, tokenizer.vocab_size, source)
        writer.append("tokens", ids.astype(dtype))
        writer.append("offsets", end + np.cumsum(lengths))
        end += int(lengths.sum())
        if group.scored is not None:
            scored = np.concatenate(group.scored)
            writer.append("scored", scored)
            ids = ids[scored]
        counted = int(size_of[ids].sum(dtype=np.int64))
        token_bytes += counted
        num_bytes += counted if group.num_bytes is None else group.num_bytes
    if token_bytes != num_bytes:
        log.warning(
            "this tokenizer does not keep text exactly (%d bytes of text, %d of tokens): bits per "
            "byte uses the bytes of the text", num_bytes, token_bytes,
        )  # fmt: skip
    log.info(
        "tokenised the %s split: %d tokens from %d bytes in %.1f s",
        *(split, end, num_bytes, time.monotonic() - started),
    )
    return {"num_bytes": num_bytes}


def _groups(source: Source, split: str, tokenizer: Tokenizer) -> Iterator[_Group]:
    """The split's documents, some at a time."""
    for documents in _grouped(source.documents(split)):
        if _has_dialogues(source):
            found = dialogue.encoded(documents, tokenizer)
            yield _Group(
                ids=[one.ids for one in found],
                num_bytes=sum(one.num_bytes for one in found),
                scored=[one.scored for one in found],
            )
        elif isinstance(documents[0], str):
            num_bytes = sum(len(text.encode()) for text in documents)
            yield _Group(ids=tokenizer.encode_batch(documents), num_bytes=num_bytes)
        elif isinstance(documents[0], Dialogue):
            raise TypeError(f"{type(source).__name__} gives dialogues: it needs `dialogues = True`")
        else:
            yield _Group(ids=documents, num_bytes=None)


def _grouped(documents: Iterable) -> Iterator[list]:
    """Neighbours, together about `_ENCODE_BYTES` long."""
    group: list = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text if isinstance(document, Dialogue) else document)
        if size >= _ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _check_ends(documents: Sequence[np.ndarray], eos: int, source: Source) -> None:
    """The end token is put around documents here, and would end one from inside."""
    for ids in documents:
        if (ids == eos).any():
            raise DataError(
                f"a document of {type(source).__name__} holds the end token, id {eos}, at position "
                f"{int(np.argmax(ids == eos))} of {len(ids)}: take the separators out of token "
                "arrays; where text spells the token, mark it as special in tokenizer.json, or "
                "choose another with HFTokenizer.eos_token"
            )


def _check_range(ids: np.ndarray, vocab_size: int, source: Source) -> None:
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
        raise DataError(
            f"{type(source).__name__} gives token id {bad}, outside the tokenizer's vocabulary of "
            f"{vocab_size}: set data.tokenizer to the one that made the tokens"
        )
