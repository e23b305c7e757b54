"""Subword tokenizers through the Hugging Face `tokenizers` library: trained here, or imported."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from moejax.data import bpe_training, chat_template
from moejax.data.chat_template import ChatTemplate
from moejax.data.dialogue import Dialogue
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint
from moejax.data.prefix import inside
from moejax.data.source import Source, existing
from moejax.data.token_pieces import byte_level_piece, sentencepiece_piece
from moejax.data.tokenizer import Tokenizer, load

log = logging.getLogger(__name__)


class Subwords(Tokenizer):
    """A tokenizer in Hugging Face's JSON format, with its end-of-document id.

    Text that spells a special token is encoded as plain text, never as that token: a document
    cannot end itself.
    """

    def __init__(
        self,
        model: dict,
        *,
        vocab_size: int,
        eos_id: int,
        chat: ChatTemplate | None = None,
        bos_id: int | None = None,
    ):
        # Kept as it came, not as this version of the library would write it: the fingerprint
        # must not change with the library.
        self._model = model
        self._backend = _plain(model)
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.chat = chat
        self.bos_id = bos_id

    @classmethod
    def from_spec(cls, spec: dict) -> Subwords:
        chat = ChatTemplate.from_spec(spec["chat"]) if "chat" in spec else None
        return cls(
            spec["model"],
            vocab_size=spec["vocab_size"],
            eos_id=spec["eos_id"],
            chat=chat,
            bos_id=spec.get("bos_id"),
        )

    def spec(self) -> dict:
        origin = {"chat": self.chat and self.chat.spec(), "bos_id": self.bos_id}
        return {
            "kind": "subwords",
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "model": self._model,
        } | {name: value for name, value in origin.items() if value is not None}

    def special_ids(self) -> dict[str, int]:
        return {token["content"]: token["id"] for token in self._special}

    def takes_blanks(self) -> dict[int, tuple[bool, bool]]:
        return {
            token["id"]: (bool(token.get("lstrip")), bool(token.get("rstrip")))
            for token in self._special
        }

    def beginning(self) -> np.ndarray:
        found = self._backend.encode("a", add_special_tokens=True)
        count = found.special_tokens_mask.index(0)
        return np.array(found.ids[:count], dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return _encoded(self._backend, texts)

    def encode_inside(self, texts: Sequence[str], *, after_special: bool) -> list[np.ndarray]:
        return _encoded(self._inside[after_special], texts)

    def encode_marked(self, text: str) -> np.ndarray:
        return _encoded(self._marked, [text])[0]

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        ids = [int(i) for i in ids if i != self.eos_id]
        if self._byte_level:
            return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return self._backend.decode(ids, skip_special_tokens=False)

    @functools.cache  # noqa: B019 - a process holds one or two tokenizers
    def token_bytes(self) -> np.ndarray:
        out = np.zeros(self.vocab_size, dtype=np.int32)
        for token_id, value in self._bytes.items():
            out[token_id] = len(value)
        out[[self.eos_id, *self.special_ids().values()]] = 0
        return out

    @functools.cached_property
    def _special(self) -> list[dict]:
        return [t for t in self._model.get("added_tokens") or [] if t.get("special")]

    @functools.cached_property
    def _inside(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        return tuple(_plain(inside(self._model, after_special=after)) for after in (False, True))

    @functools.cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        backend = _plain(self._model)
        backend.encode_special_tokens = False
        return backend

    @functools.cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self._model["decoder"])

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        """What each id stands for."""
        added = {t["id"]: t["content"].encode() for t in self._model["added_tokens"]}
        piece = byte_level_piece if self._byte_level else sentencepiece_piece
        vocab = self._backend.get_vocab(with_added_tokens=False)
        return {**{i: piece(token) for token, i in vocab.items()}, **added}


def train_bpe(texts: Iterable[str], vocab_size: int) -> Subwords:
    """Trains a byte-level BPE: lossless for any text, and the same for the same texts.

    Beyond 32 MB of text it uses every second, fourth, ... text.

    Args:
      texts: the training documents, in a fixed order.
      vocab_size: tokens in all: 256 bytes, the merges, and the end of a document (the last id).
    """
    model = bpe_training.trained(texts, vocab_size)
    return Subwords(model, vocab_size=vocab_size, eos_id=vocab_size - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BPE:
    """Config of a byte-level BPE, trained on the training split and kept in the cache folder.

    Attributes:
      vocab_size: tokens in all, the end of a document included.
    """

    vocab_size: int = 4096

    def prepare(self, source: Source, cache_dir: str) -> Tokenizer:
        key = fingerprint(
            "bpe",
            bpe_training.WORDS,
            bpe_training.SAMPLE_BYTES,
            self.vocab_size,
            source.fingerprint("train"),
        )
        path = pathlib.Path(cache_dir) / "tokenizers" / f"{key}.json"
        if path.exists():
            try:
                return load(path)
            except DataError as e:
                log.warning("training the tokenizer again: %s", e)
        log.info("training a BPE of %d tokens (once; kept in %s)", self.vocab_size, path)
        tokenizer = train_bpe(_texts(source), self.vocab_size)
        try:
            tokenizer.save(path)
        except OSError as e:
            raise DataError(
                f"cannot write the tokenizer to {str(path)!r} ({e.strerror}): set data.cache_dir "
                "or MOEJAX_CACHE to a folder that can be written and has room"
            ) from e
        return tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFTokenizer:
    """Config of a tokenizer in a Hugging Face `tokenizer.json`.

    Attributes:
      path: that file or the folder that holds it (then `tokenizer_config.json` names the end
        token); a file saved by moejax works as well.
      eos_token: the token that ends a document; None takes it from `tokenizer_config.json`.
      vocab_size: rows of the model's embedding where it has more than the tokenizer has ids.
    """

    path: str
    eos_token: str | None = None
    vocab_size: int | None = None

    def prepare(self, source: Source | None, cache_dir: str) -> Tokenizer:
        del source, cache_dir
        path = existing(self.path, what="tokenizer file or folder")
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            model = json.loads(existing(str(file), what="tokenizer file").read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise DataError(f"the tokenizer file {str(file)!r} cannot be read: {e}") from e
        if isinstance(model, dict) and str(model.get("format", "")).startswith("moejax"):
            return self._stored(file)
        try:
            backend = _backend(model)
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{str(file)!r} is not a Hugging Face tokenizer: {e}") from e
        vocab_size, eos_id = self._sizes(backend, file)
        chat = chat_template.read(file.parent)
        bos_token = _config_token(file.parent, "bos_token")
        bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        return Subwords(model, vocab_size=vocab_size, eos_id=eos_id, chat=chat, bos_id=bos_id)

    def _stored(self, file: pathlib.Path) -> Tokenizer:
        found = load(file)
        if self.eos_token is not None or self.vocab_size not in (None, found.vocab_size):
            raise DataError(
                f"{str(file)!r} is a tokenizer of moejax with {found.vocab_size} ids, which says "
                "itself what ends a document: leave out eos_token and vocab_size"
            )
        return found

    def _sizes(self, backend: tokenizers.Tokenizer, file: pathlib.Path) -> tuple[int, int]:
        eos_token = self.eos_token or _config_token(file.parent, "eos_token")
        eos_id = None if eos_token is None else backend.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(
                f"{str(file)!r} has no end-of-document token {eos_token!r}: set "
                "HFTokenizer.eos_token to one of its tokens"
            )
        num_ids = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        vocab_size = self.vocab_size or num_ids
        if vocab_size < num_ids:
            raise DataError(
                f"HFTokenizer.vocab_size={vocab_size} is below the {num_ids} ids of {str(file)!r}"
            )
        return vocab_size, eos_id


def _backend(model: dict) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(model))
    except Exception as e:  # the library raises a bare Exception for bad JSON
        raise ValueError(str(e)) from e


def _plain(model: dict) -> tokenizers.Tokenizer:
    """Encodes text whole, and what spells a special token as text."""
    backend = _backend(model)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encoded(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(e.ids, dtype=np.int32) for e in encodings]


def _config_token(folder: pathlib.Path, name: str) -> str | None:
    try:
        token = json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _texts(source: Source) -> Iterable[str]:
    for document in source.documents("train"):
        if isinstance(document, Dialogue):
            yield document.text
            continue
        if not isinstance(document, str):
            raise DataError(
                "a BPE cannot be trained on token arrays: set data.tokenizer to the one that made "
                "them, for example HFTokenizer(path=...)"
            )
        yield document
