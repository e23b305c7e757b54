"""Data: sources -> tokenizer -> packed rows -> batches by step number.

`Data(...).prepare(seq_len=..., batch_size=..., seed=...)` gives `Loaders`. Each stage is a file:
`source.py` (and `jsonl.py`, `chat.py`, `token_arrays.py`), `tokenizer.py` (and `subword.py`,
`chat_template.py`), `documents.py` (tokens on disk; of dialogues, `dialogue.py`), `pack.py`,
`rows.py`, `mixture.py`, `loader.py`.
"""

from moejax.data.chat import Chat
from moejax.data.errors import DataError
from moejax.data.jsonl import JsonLines
from moejax.data.mixture import Mixture
from moejax.data.pack import BestFit, ConcatChunk
from moejax.data.pipeline import Data, Loaders
from moejax.data.source import Source, TextFiles, python_stdlib
from moejax.data.subword import BPE, HFTokenizer, train_bpe
from moejax.data.token_arrays import TokenArrays, write_token_arrays
from moejax.data.tokenizer import ByteTokenizer, Tokenizer

__all__ = [
    "BPE",
    "BestFit",
    "ByteTokenizer",
    "Chat",
    "ConcatChunk",
    "Data",
    "DataError",
    "HFTokenizer",
    "JsonLines",
    "Loaders",
    "Mixture",
    "Source",
    "TextFiles",
    "TokenArrays",
    "Tokenizer",
    "python_stdlib",
    "train_bpe",
    "write_token_arrays",
]
