"""What general compressors need for the held-out text: the yardstick for bits per byte."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import pathlib
from collections.abc import Callable, Iterable

from moejax.data.fingerprint import fingerprint

log = logging.getLogger(__name__)

MAX_BYTES = 32 * 2**20  # xz -9 takes about a second per megabyte


def compression_baselines(
    texts: Callable[[], Iterable[str]], *, key: str, cache_dir: str
) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` over the texts, joined into one file.

    Args:
      texts: gives the held-out documents; called only when the result is not in the cache. Of
        very long ones the first `MAX_BYTES` are compressed.
      key: changes when the documents do.
      cache_dir: where the result is kept.

    Returns:
      `{"gzip -9": bits per byte, "xz -9": bits per byte}`.
    """
    path = pathlib.Path(cache_dir) / "baselines" / f"{fingerprint(key, MAX_BYTES)}.json"
    try:
        found = json.loads(path.read_text())
        return {"gzip -9": float(found["gzip -9"]), "xz -9": float(found["xz -9"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    data = bytearray()
    for text in texts():
        data += text.encode()
        if len(data) > MAX_BYTES:
            break
    data = bytes(data[:MAX_BYTES])
    out = {
        "gzip -9": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(out) + "\n")
        os.replace(partial, path)
    except OSError as e:  # they cost seconds: not worth an error
        log.warning("cannot keep the compression baselines in %s: %s", path.parent, e)
    return out
