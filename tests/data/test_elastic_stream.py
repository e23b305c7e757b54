"""The stream of tokens is one stream, however many hosts read it and whenever that changes."""

import hashlib

import numpy as np
import pytest

from moejax.data import BestFit, ConcatChunk
from moejax.data.mixture import Mixture
from moejax.data.pipeline import Data
from moejax.data.source import TextFiles
from moejax.data.tokenizer import ByteTokenizer

BATCH, STEPS = 8, 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two sources of documents of very different lengths."""
    rng = np.random.default_rng(0)
    made = []
    for name, longest in (("short", 30), ("long", 400)):
        folder = tmp_path_factory.mktemp(name)
        for number in range(60):
            letters = rng.integers(97, 123, rng.integers(1, longest))
            (folder / f"{number}.txt").write_text(bytes(letters.tolist()).decode())
        made.append(str(folder))
    return made


def stream(folders, cache, packing, hosts_at):
    """SHA-256 of all fields of all batches, each put together from the parts of its step's hosts.

    Whenever their number changes all of it is opened anew, as after a restart.
    """
    digest, loaders, before = hashlib.sha256(), None, None
    for step in range(STEPS):
        num_hosts = hosts_at(step)
        if num_hosts != before:
            sources = tuple(TextFiles(path=folder, pattern="*.txt") for folder in folders)
            mixture = Mixture(sources=sources, weights=(0.7, 0.3))
            data = Data(
                train=mixture, tokenizer=ByteTokenizer(), packing=packing, cache_dir=str(cache)
            )
            prepare = lambda data=data: data.prepare(seq_len=16, batch_size=BATCH, seed=3)
            loaders, before = [prepare() for _ in range(num_hosts)], num_hosts
        parts = [host.train.batch(step, (i, num_hosts)) for i, host in enumerate(loaders)]
        for name in vars(parts[0]):
            whole = np.concatenate([getattr(part, name) for part in parts])
            assert whole.shape[0] == BATCH
            digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("packing", [BestFit(), ConcatChunk()], ids=["best-fit", "concat"])
def test_the_stream_is_the_same_on_1_2_4_and_8_hosts_and_when_that_changes(
    folders, tmp_path, packing
):
    found = {n: stream(folders, tmp_path, packing, lambda step, n=n: n) for n in (1, 2, 4, 8)}
    found["changing"] = stream(folders, tmp_path, packing, lambda step: (8, 1, 4, 2)[step // 10])
    assert len(set(found.values())) == 1, found


def test_another_packing_or_order_is_another_stream(folders, tmp_path):
    """Or the test above could not fail."""
    one = lambda step: 1
    found = {stream(folders, tmp_path, packing, one) for packing in (BestFit(), ConcatChunk())}
    found.add(stream(folders[::-1], tmp_path, BestFit(), one))
    assert len(found) == 3
