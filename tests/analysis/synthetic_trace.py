"""Writes routing traces of a model that never was: uneven loads, topics, padding, empty slots."""

import pathlib

import numpy as np

from moejax.analysis.trace import TraceBatch, TraceInfo, batch_of_rows
from moejax.analysis.trace_file import TraceWriter

SHAPE = {"batch_size": 3, "sequence_length": 40}


def trace_info(**changes) -> TraceInfo:
    values = {
        "num_experts": 8,
        "k": 2,
        "layers": (1, 2, 4),
        "sequence_length": SHAPE["sequence_length"],
        "tokenizer": "of bytes",
        "sources": ("a.txt", "b.txt"),
        "documents": "texts",
        "weights": {"folder": "runs/none", "step": 7, "fingerprint": "0123456789abcdef"},
        "config": "model.d_model = 16\n",
        "versions": {"jax": "0.10.2"},
    }
    return TraceInfo(**(values | changes))


def rows(info: TraceInfo, rng, *, first: int, batch_size: int, sequence_length: int) -> dict:
    """Arguments of `batch_of_rows`: two sequences in each row, and padding at its end."""
    shape = (batch_size, sequence_length)
    cut = rng.integers(2, sequence_length // 2, batch_size)
    at = np.arange(sequence_length)
    segment_ids = 1 + (at >= cut[:, None])
    segment_ids[:, sequence_length - sequence_length // 8 :] = 0
    num_layers, num_tokens = len(info.layers), batch_size * sequence_length
    taste = np.random.default_rng(1).normal(size=(num_layers, 1, info.num_experts))
    z = taste + rng.gumbel(size=(num_layers, num_tokens, info.num_experts))
    probs = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    experts = np.argsort(-z, axis=-1)[..., : info.k]
    weights = np.take_along_axis(probs, experts, -1)
    nowhere = segment_ids.reshape(-1) == 0
    experts[:, nowhere], weights[:, nowhere], probs[:, nowhere] = info.num_experts, np.nan, np.nan
    if info.k > 1:
        experts[0, 0, -1], weights[0, 0, -1] = -1, 0  # a choice that a router left empty
    documents = first + np.arange(2 * batch_size)
    return {
        "tokens": rng.integers(0, 300, shape),
        "segment_ids": segment_ids,
        "documents": documents,
        "sources": documents % len(info.sources),
        "experts": experts,
        "weights": weights.astype(np.float32),
        "probs": probs.astype(np.float32),
    }


def batches(
    info: TraceInfo, *, count: int = 3, seed: int = 0, keep_probs: bool = False, **shape: int
) -> list[TraceBatch]:
    """`count` batches, documents numbered through."""
    rng, sizes = np.random.default_rng(seed), SHAPE | shape
    firsts = [2 * sizes["batch_size"] * n for n in range(count)]
    return [
        batch_of_rows(info, **rows(info, rng, first=first, **sizes), keep_probs=keep_probs)
        for first in firsts
    ]


def write_trace(path: pathlib.Path, info: TraceInfo | None = None, **options) -> pathlib.Path:
    """A trace file of `batches`."""
    info = info or trace_info()
    with TraceWriter(path, info) as writer:
        for batch in batches(info, **options):
            writer.add(batch)
    return path
