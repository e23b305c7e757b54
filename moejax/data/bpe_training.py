"""Training of a byte-level BPE (Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moejax.data.errors import DataError

log = logging.getLogger(__name__)

# How text is cut before merging; no token crosses a cut. A word may begin with a blank and one
# sign (" .append" is one word), at most three digits stay together, and a line end keeps the
# indentation that follows. On Python source this gives 7% fewer tokens than GPT-2's rule.
WORDS = r" ?[^\s\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\s*\n[ \t]*)?|\s*\n[ \t]*|\s+"
SAMPLE_BYTES = 32 * 2**20  # a BPE is trained on at most about this much text
_MIN_VOCAB = 257  # every byte, and the end of a document


def trained(texts: Iterable[str], vocab_size: int) -> dict:
    """The tokenizer of `vocab_size - 1` ids, in Hugging Face's JSON; see `train_bpe`."""
    if vocab_size < _MIN_VOCAB:
        raise DataError(f"BPE.vocab_size={vocab_size} is too small: {_MIN_VOCAB} is the least")
    started = time.monotonic()
    sample = _sample(texts)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the last id is the end of a document, outside the merges
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer)
    num_tokens = backend.get_vocab_size()
    if num_tokens != vocab_size - 1:
        raise DataError(
            f"the training text gives only {num_tokens + 1} tokens, fewer than "
            f"BPE.vocab_size={vocab_size}: lower it or add text"
        )
    log.info("trained a BPE of %d tokens in %.1f s", vocab_size, time.monotonic() - started)
    return json.loads(backend.to_str())


def _sample(texts: Iterable[str]) -> list[str]:
    """Every 2**k-th text, with the smallest k that keeps at most `SAMPLE_BYTES` characters."""
    kept: list[str] = []
    size, stride = 0, 1
    for i, text in enumerate(texts):
        if i % stride:
            continue
        kept.append(text)
        size += len(text)
        while size > SAMPLE_BYTES and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept
