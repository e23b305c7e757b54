"""Tokens per second of the data loader, from rows that are already in the cache.

    python tools/bench_data.py [--seconds 3] [--json OUT]

Documents are synthetic, with the log-normal lengths of source files (median 1,200 tokens), or
short ones (median 120) so that a row holds many. Each line is one global batch after another in
step order, with every field of `Batch`; required per host: 4M tokens/s at length 256 and 25M at
2,048. The "row by row" lines build the same batches with grain's own shuffle and batch, one
Python call per row: the reason why the loader works on a batch of row numbers at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable

import grain
import jax
import numpy as np

from moejax.data.cache import ArrayWriter, open_or_build
from moejax.data.documents import Documents
from moejax.data.loader import TrainLoader
from moejax.data.pack import BestFit, ConcatChunk, Packing, packed
from moejax.data.rows import Rows

REQUIRED = {256: 4e6, 2048: 25e6}
NUM_TOKENS = 50_000_000  # larger than any processor cache: rows come from the page cache


def documents(*, median: int, seed: int, cache_dir: str) -> Documents:
    """Random tokens in the cache folder, opened as a training run opens them."""

    def fill(writer: ArrayWriter) -> dict:
        rng = np.random.default_rng(seed)
        lengths = rng.lognormal(np.log(median), 1.2, size=2 * NUM_TOKENS // median)
        offsets = np.append(0, np.cumsum(lengths.astype(np.int64) + 1))
        offsets = offsets[: np.searchsorted(offsets, NUM_TOKENS)]
        writer.append("tokens", rng.integers(0, 4096, size=offsets[-1] + 1, dtype=np.uint16))
        writer.append("offsets", offsets)
        return {}

    key = f"bench-{median}-{seed}"
    arrays, _ = open_or_build(pathlib.Path(cache_dir) / key, key, fill, what="the token cache")
    return Documents(**arrays, num_bytes=0, fingerprint=key)


def tokens_per_second(
    batch: Callable[[int], object], num_tokens: int, seconds: float
) -> list[float]:
    """The rates of five stretches, each of batches not asked for before."""
    step, rates = 0, []
    for _ in range(6):
        start, first = time.perf_counter(), step
        while time.perf_counter() - start < seconds / 5:
            batch(step)
            step += 1
        rates.append((step - first) * num_tokens / (time.perf_counter() - start))
    return rates[1:]


def row_by_row(rows: Rows, batch_size: int) -> Callable[[int], object]:
    def one(number: int) -> dict:
        return {k: v[0] for k, v in vars(rows.row(number)).items()}

    return (
        grain.MapDataset.source(range(len(rows)))
        .shuffle(seed=0)
        .repeat()
        .map(one)
        .batch(batch_size)
        .__getitem__
    )


def measure(
    packing: Packing, seq_len: int, median: int, cache_dir: str, args: argparse.Namespace
) -> list[dict]:
    batch_size = args.tokens_per_batch // seq_len  # of one host
    parts = []
    for seed in range(2):
        docs = documents(median=median, seed=seed, cache_dir=cache_dir)
        parts.append(packed(docs, packing, seq_len=seq_len, seed=0, cache_dir=cache_dir))
    mixed = TrainLoader(parts, weights=(0.7, 0.3), batch_size=batch_size, seed=0)
    of_four = TrainLoader(parts, weights=(0.7, 0.3), batch_size=4 * batch_size, seed=0)
    cases = {
        "one source": TrainLoader(parts[:1], batch_size=batch_size, seed=0).batch,
        "mixture of two": mixed.batch,
        "mixture, host 0 of 4": lambda t: of_four.batch(t, (0, 4)),
        "row by row (grain)": row_by_row(parts[0], batch_size),
    }
    out = []
    for case, batch in cases.items():
        rates = tokens_per_second(batch, batch_size * seq_len, args.seconds)
        out.append(
            {
                "packing": type(packing).__name__,
                "seq_len": seq_len,
                "median_document": median,
                "case": case,
                "tokens_per_second": round(float(np.median(rates))),
                "best_tokens_per_second": round(max(rates)),
                "efficiency": round(parts[0].efficiency, 4),
                "required": REQUIRED[seq_len],
            }
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="per line")
    parser.add_argument("--tokens-per-batch", type=int, default=65536)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}; numpy {np.__version__}, grain {_version('grain')}, "
          f"jax {jax.__version__}")  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for seq_len, packing, median in itertools.product(
            REQUIRED, (BestFit(), ConcatChunk()), (1200, 120)
        ):
            for r in measure(packing, seq_len, median, cache_dir, args):
                results.append(r)
                print(_line(r), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    ours = [r for r in results if "grain" not in r["case"]]
    return int(any(r["tokens_per_second"] < r["required"] for r in ours))


def _line(r: dict) -> str:
    rate, best = r["tokens_per_second"], r["best_tokens_per_second"]
    return (
        f"S={r['seq_len']:5} {r['packing']:12} documents ~{r['median_document']:5} {r['case']:21} "
        f"{rate / 1e6:7.1f} M tokens/s (best {best / 1e6:6.1f})  {rate / r['required']:5.1f}x "
        f"required  {100 * r['efficiency']:.1f}% filled"
    )


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    sys.exit(main())
