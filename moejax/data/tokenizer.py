"""Tokenizers: text to token ids and back, exactly, and the number of bytes each token stands for.

A *tokenizer* (`Bytes`, `Subwords`) is what a checkpoint carries: one JSON file. A config names
how to come by one: `ByteTokenizer()`, `BPE(vocab_size=4096)` or `HFTokenizer(path=...)`, each
with `prepare(source, cache_dir)`; see `subword.py` for the last two.

`eos_id` ends every document and is the first input of every document (there is no separate
beginning token), so the model predicts each byte of a text once. No text encodes to `eos_id`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from moejax.data.chat_template import ChatTemplate
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint

FORMAT = "moejax-tokenizer-1"
FILE_NAME = "tokenizer.json"


class Tokenizer(abc.ABC):
    """Encodes UTF-8 text; what every tokenizer offers."""

    vocab_size: int  # all ids are in [0, vocab_size)
    eos_id: int
    # What the tokenizers of published models say beside how they encode; not in the fingerprint.
    chat: ChatTemplate | None = None  # how a conversation is laid out
    bos_id: int | None = None  # the token that begins a text

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids [n], without `eos_id`."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the tokenizer can."""

    def encode_inside(self, texts: Sequence[str], *, after_special: bool) -> list[np.ndarray]:
        """`encode_batch` of texts that each follow a special token, or other text, in a document.

        The difference is the blank that some tokenizers put before a text.
        """
        del after_special
        return self.encode_batch(texts)

    def encode_marked(self, text: str) -> np.ndarray:
        """`encode`, but what spells a special token is that token, as in published tokenizers."""
        return self.encode(text)

    @abc.abstractmethod
    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        """Ids to text; the inverse of `encode`. Bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: how many UTF-8 bytes a token stands for; 0 for `eos_id` and unused ids.

        Summed over the tokens of a text it is the text's length in bytes, exactly.
        """

    @abc.abstractmethod
    def spec(self) -> dict:
        """All that is needed to build the tokenizer again, as JSON-able values."""

    def special_ids(self) -> dict[str, int]:
        """{text: id} of the special tokens, which `encode` never gives."""
        return {}

    def takes_blanks(self) -> dict[int, tuple[bool, bool]]:
        """{id: whether the special token takes in the blanks on its left, and on its right}."""
        return {}

    def beginning(self) -> np.ndarray:
        """int32 [n], often none: the ids that a published tokenizer puts in front of every text.

        `encode` does not: documents begin as this file says.
        """
        return np.zeros(0, np.int32)

    @functools.cache  # noqa: B019 - a process holds one or two tokenizers
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers that encode alike."""
        return fingerprint({k: v for k, v in self.spec().items() if k not in ("chat", "bos_id")})

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Writes one JSON file and returns its path.

        Args:
          path: a `.json` file, or a folder (made if missing) that gets `tokenizer.json`.
        """
        target = _file_in(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target and renamed: a reader never sees half a file.
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_text(
            json.dumps({"format": FORMAT, **self.spec()}, ensure_ascii=True) + "\n", "utf-8"
        )
        os.replace(partial, target)
        return target


def load(path: str | os.PathLike) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote, from the file or the folder that holds it."""
    target = _file_in(path)
    try:
        spec = json.loads(target.read_text("utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"there is no tokenizer at {str(target)!r}") from e
    except (OSError, ValueError) as e:
        raise DataError(f"the tokenizer file {str(target)!r} cannot be read: {e}") from e
    form = spec.get("format") if isinstance(spec, dict) else None
    if form != FORMAT:
        raise DataError(
            f"{str(target)!r} is not a moejax tokenizer (format {form!r}, expected {FORMAT!r}): "
            "for a Hugging Face tokenizer use HFTokenizer(path=...)"
        )
    try:
        return from_spec(spec)
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"the tokenizer file {str(target)!r} is damaged: {e!r}") from e


def from_spec(spec: dict) -> Tokenizer:
    """The tokenizer that `Tokenizer.spec` describes."""
    if spec["kind"] == "bytes":
        return Bytes()
    if spec["kind"] == "subwords":
        from moejax.data.subword import Subwords  # imports this file

        return Subwords.from_spec(spec)
    raise ValueError(f"unknown kind {spec['kind']!r}")


class Bytes(Tokenizer):
    """One token per UTF-8 byte. Ids 0-255 are the bytes and 256 is `eos_id`.

    Ids 257-263 never occur: they round the vocabulary up to a multiple of 8, so that it can be
    split over devices.
    """

    vocab_size = 264
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(t) for t in texts]

    def decode(self, ids: Sequence[int | np.integer] | np.ndarray) -> str:
        ids = np.asarray(ids, dtype=np.int64)
        return bytes(ids[(ids >= 0) & (ids < 256)].astype(np.uint8)).decode("utf-8", "replace")

    @functools.cache  # noqa: B019 - one small array per process
    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def spec(self) -> dict:
        return {"kind": "bytes"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer:
    """Config of the built-in byte tokenizer: nothing to train, vocabulary 264."""

    def prepare(self, source: object, cache_dir: str) -> Tokenizer:
        del source, cache_dir
        return Bytes()


def _file_in(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path).expanduser()
    return path if path.suffix == ".json" else path / FILE_NAME
