"""`Data`: the root of a data config, from sources to batches."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from moejax.data.baselines import compression_baselines
from moejax.data.dialogue import Dialogue
from moejax.data.documents import tokenized
from moejax.data.errors import DataError
from moejax.data.fingerprint import fingerprint
from moejax.data.loader import EvalLoader, TrainLoader
from moejax.data.mixture import Mixture, check_apart
from moejax.data.pack import BestFit, Packing, packed
from moejax.data.source import Source, existing, python_stdlib
from moejax.data.subword import BPE
from moejax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # of the order of rows: raise it when the same config would give other batches


@runtime_checkable
class TokenizerConfig(Protocol):
    """How to come by a tokenizer; see `tokenizer.py`."""

    def prepare(self, source: Source, cache_dir: str) -> Tokenizer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaders:
    """Everything training and evaluation need from the data.

    Attributes:
      train: batches by step.
      eval: every held-out token once.
      tokenizer: what the ids mean; goes into the checkpoint.
      fingerprint: equal exactly when the same step gives the same batch; goes into the
        checkpoint beside the step.
      held_out_fingerprint: equal exactly when `eval` gives the same rows; goes there too.
      held_out_bytes: UTF-8 bytes of the held-out text, of dialogues of what is scored. Bits per
        byte is the summed loss of all targets of `eval` in nats / ln 2 / `held_out_bytes`.
      num_train_tokens: predictions in one epoch of every training source.
      num_scored_tokens: those of them that count: all, but for dialogues only the responses'.
      num_held_out_tokens: predictions in `eval` that count.
      efficiency: share of training positions that are not padding.
    """

    train: TrainLoader
    eval: EvalLoader
    tokenizer: Tokenizer
    fingerprint: str
    held_out_fingerprint: str
    held_out_bytes: int
    num_train_tokens: int
    num_scored_tokens: int
    num_held_out_tokens: int
    efficiency: float
    _sources: tuple[Source, ...]
    _held_out_key: str
    _cache_dir: str

    def held_out_texts(self) -> Iterator[str]:
        """The held-out documents as text; of dialogues the responses."""
        for source in self._sources:
            for document in source.documents("eval"):
                if isinstance(document, Dialogue):
                    yield document.responses
                else:
                    yield document if isinstance(document, str) else self.tokenizer.decode(document)

    def compression_baselines(self) -> dict[str, float]:
        """Bits per byte of `gzip -9` and `xz -9` on the held-out text; kept in the cache."""
        return compression_baselines(
            self.held_out_texts, key=self._held_out_key, cache_dir=self._cache_dir
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What to train and evaluate on.

    Attributes:
      train: a source, or a `Mixture` of sources. Each holds out its own evaluation split.
      tokenizer: `BPE(...)`, `HFTokenizer(...)` or `ByteTokenizer()`.
      packing: `BestFit()` or `ConcatChunk()`.
      cache_dir: where tokenizers, tokens and row indices are kept; None is the environment
        variable MOEJAX_CACHE or else `~/.cache/moejax`.
      shuffle: shuffle documents before packing, and rows in every epoch.
    """

    train: Source | Mixture = dataclasses.field(default_factory=python_stdlib)
    tokenizer: TokenizerConfig = BPE()
    packing: Packing = BestFit()
    cache_dir: str | None = None
    shuffle: bool = True

    def check(self, *, seq_len: int, batch_size: int, seed: int) -> None:
        """Raises DataError for what is wrong before any document is read; takes no time."""
        _check_sizes(seq_len, batch_size, seed)
        for source in self._sources()[0]:
            path = getattr(source, "path", None)  # what sources of files call it
            if path is not None:
                existing(path, what=f"{type(source).__name__}.path")

    def prepare(
        self, *, seq_len: int, batch_size: int, seed: int, eval_batch_size: int | None = None
    ) -> Loaders:
        """Trains the tokenizer, tokenises and packs, as far as the cache does not hold it yet.

        Args:
          seq_len: S, tokens per row; at least 2.
          batch_size: B, rows of the global batch.
          seed: of every shuffle; in [0, 2**63).
          eval_batch_size: rows of a held-out batch; as many as of a training batch where None.

        Raises:
          DataError: one sentence about what is wrong and how to mend it.
        """
        _check_sizes(seq_len, batch_size, seed)
        cache_dir, sources, weights = self._cache_dir(), *self._sources()
        check_apart(sources)
        joined = _Joined(sources) if len(sources) > 1 else sources[0]
        tokenizer = self.tokenizer.prepare(joined, cache_dir)
        splits = {
            split: [tokenized(s, split, tokenizer, cache_dir) for s in sources]
            for split in ("train", "eval")
        }
        pack = functools.partial(packed, seq_len=seq_len, cache_dir=cache_dir, packing=self.packing)
        train = [pack(d, seed=seed if self.shuffle else None) for d in splits["train"]]
        held_out = [pack(d, seed=None) for d in splits["eval"]]
        _check_enough(sum(map(len, train)), seq_len, batch_size)
        num_train_tokens = sum(rows.num_predictions for rows in train)
        loaders = Loaders(
            train=TrainLoader(
                train, weights=weights, batch_size=batch_size, seed=seed, shuffle=self.shuffle
            ),
            eval=EvalLoader(held_out, batch_size=eval_batch_size or batch_size),
            tokenizer=tokenizer,
            fingerprint=fingerprint(
                *("batches", FORMAT, [r.fingerprint for r in train], weights),
                *(batch_size, seed, self.shuffle),
            ),
            held_out_fingerprint=fingerprint("held out", [r.fingerprint for r in held_out]),
            held_out_bytes=sum(rows.num_bytes(tokenizer.token_bytes()) for rows in held_out),
            num_train_tokens=num_train_tokens,
            num_scored_tokens=sum(rows.num_scored for rows in train),
            num_held_out_tokens=sum(rows.num_scored for rows in held_out),
            efficiency=num_train_tokens / (sum(map(len, train)) * seq_len),
            _sources=sources,
            _held_out_key=fingerprint([d.fingerprint for d in splits["eval"]]),
            _cache_dir=cache_dir,
        )
        log.info(
            "%d training tokens (%d scored) in %d rows of %d (%.1f%% filled), %d held-out bytes",
            *(num_train_tokens, loaders.num_scored_tokens, loaders.train.num_rows, seq_len),
            *(100 * loaders.efficiency, loaders.held_out_bytes),
        )
        return loaders

    def _cache_dir(self) -> str:
        chosen = self.cache_dir or os.environ.get("MOEJAX_CACHE") or "~/.cache/moejax"
        return str(pathlib.Path(chosen).expanduser())

    def _sources(self) -> tuple[tuple[Source, ...], tuple[float, ...]]:
        if not isinstance(self.train, Mixture):
            return (self.train,), (1.0,)
        self.train.check()
        return tuple(self.train.sources), tuple(map(float, self.train.weights))


class _Joined:
    """The sources one after the other: what a tokenizer is trained on."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources

    def documents(self, split: str) -> Iterator:
        for source in self._sources:
            yield from source.documents(split)

    def fingerprint(self, split: str) -> str:
        return fingerprint([s.fingerprint(split) for s in self._sources])


def _check_sizes(seq_len: int, batch_size: int, seed: int) -> None:
    if seq_len < 2:
        raise DataError(f"seq_len={seq_len} is too short: a row needs at least 2 tokens")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: a batch needs at least 1 row")
    if not 0 <= seed < 2**63:
        raise DataError(f"seed={seed} is outside [0, 2**63)")


def _check_enough(num_rows: int, seq_len: int, batch_size: int) -> None:
    if num_rows < batch_size:
        raise DataError(
            f"the training data fills {num_rows} rows of seq_len={seq_len}, less than one batch of "
            f"batch_size={batch_size}: add data or lower either"
        )
