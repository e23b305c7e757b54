"""What a token of a vocabulary stands for, in bytes: byte-level and sentencepiece vocabularies."""

from __future__ import annotations

import functools


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the rest follows from 256."""
    same = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in same]
    return {**{chr(b): b for b in same}, **{chr(256 + i): b for i, b in enumerate(rest)}}


def byte_level_piece(token: str) -> bytes:
    """The bytes of a piece in the byte-level alphabet (GPT-2, Qwen, OLMoE)."""
    table = _byte_of_char()
    if all(c in table for c in token):
        return bytes(table[c] for c in token)
    return token.encode()


def sentencepiece_piece(token: str) -> bytes:
    """A piece with byte fallback "<0x0A>" and U+2581 for a blank (Llama 2, Mixtral)."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
