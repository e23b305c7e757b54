import dataclasses
import logging

import fiddle as fdl
import numpy as np
import pytest

from moejax.data import (
    BPE,
    BestFit,
    ByteTokenizer,
    ConcatChunk,
    Data,
    DataError,
    JsonLines,
    Mixture,
    TextFiles,
)
from moejax.data.tokenizer import load
from tests.data.conftest import text


def sizes(**kwargs):
    return {"seq_len": 32, "batch_size": 4, "seed": 0, **kwargs}


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE(vocab_size=300)])
@pytest.mark.parametrize("packing", [BestFit(), ConcatChunk()])
def test_eval_targets_are_the_held_out_bytes_exactly(data, tokenizer, packing):
    data = dataclasses.replace(data, tokenizer=tokenizer, packing=packing)
    loaders = data.prepare(**sizes())
    texts = list(data.train.documents("eval"))
    assert list(loaders.held_out_texts()) == texts
    assert loaders.held_out_bytes == sum(len(t.encode()) for t in texts)
    size = loaders.tokenizer.token_bytes()
    total = count = 0
    for batch in loaders.eval:
        total += int((size[batch.targets] * batch.loss_mask).sum())
        count += int(batch.loss_mask.sum())
    assert total == loaders.held_out_bytes
    assert count == loaders.num_held_out_tokens


def test_an_unshuffled_epoch_is_the_text(data):
    data = dataclasses.replace(data, shuffle=False, packing=ConcatChunk())
    loaders = data.prepare(**sizes())
    num_batches = loaders.train.num_rows // 4
    ids = np.concatenate([loaders.train.batch(t).targets.ravel() for t in range(num_batches)])
    joined = "".join(data.train.documents("train")).encode()
    got = loaders.tokenizer.decode(ids).encode()
    assert joined.startswith(got[:-4])
    assert len(got) > 0.9 * len(joined)


def test_no_held_out_document_is_trained_on(data):
    data = dataclasses.replace(data, packing=ConcatChunk())
    loaders = data.prepare(**sizes(seq_len=4096, batch_size=1))
    trained = "".join(
        loaders.tokenizer.decode(loaders.train.batch(t).targets[0])
        for t in range(loaders.train.num_rows)
    )
    for split, expected in (("train", True), ("eval", False)):
        for document in data.train.documents(split):
            assert (document.partition("\n")[0] + "\n" in trained) == expected


def test_a_second_prepare_computes_nothing_and_gives_the_same(data, tmp_path):
    first = data.prepare(**sizes())
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    again = data.prepare(**sizes())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == written
    assert again.fingerprint == first.fingerprint
    for t in (0, 50):
        np.testing.assert_array_equal(again.train.batch(t).tokens, first.train.batch(t).tokens)
    elsewhere = dataclasses.replace(data, cache_dir=str(tmp_path / "cache2")).prepare(**sizes())
    assert elsewhere.fingerprint == first.fingerprint
    np.testing.assert_array_equal(elsewhere.train.batch(9).tokens, first.train.batch(9).tokens)


def test_the_fingerprint_changes_with_all_that_changes_a_batch(data):
    prints = [data.prepare(**sizes(**c)).fingerprint for c in
              ({}, {"seq_len": 33}, {"batch_size": 5}, {"seed": 1})]  # fmt: skip
    prints += [
        dataclasses.replace(data, **c).prepare(**sizes()).fingerprint
        for c in (
            {"shuffle": False},
            {"packing": ConcatChunk()},
            {"tokenizer": BPE(vocab_size=300)},
        )
    ]
    assert len(set(prints)) == len(prints)


def test_a_damaged_token_cache_is_mended(data, tmp_path, caplog):
    before = data.prepare(**sizes()).train.batch(3)
    for file in (tmp_path / "cache").rglob("*.bin"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 16
        file.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        after = data.prepare(**sizes()).train.batch(3)
    np.testing.assert_array_equal(before.tokens, after.tokens)
    assert caplog.text.count("is damaged") == 4  # tokens and rows of both splits


def test_mixture(data, tmp_path):
    import json

    lines = [json.dumps({"text": text(i, 30)}) for i in range(50)]
    (tmp_path / "extra.jsonl").write_text("\n".join(lines))
    sources = (data.train, JsonLines(path=str(tmp_path / "extra.jsonl"), holdout_every=5))
    mixed = dataclasses.replace(data, train=Mixture(sources=sources, weights=(3, 1)))
    loaders = mixed.prepare(**sizes())
    assert loaders.held_out_bytes == sum(
        len(t.encode()) for s in sources for t in s.documents("eval")
    )
    part, _ = loaders.train.rows(0, 4000)
    assert abs((part == 0).mean() - 0.75) < 0.001
    reweighted = dataclasses.replace(mixed, train=Mixture(sources=sources, weights=(2, 1)))
    assert reweighted.prepare(**sizes()).fingerprint != loaders.fingerprint


def test_the_tokenizer_travels(data, tmp_path):
    data = dataclasses.replace(data, tokenizer=BPE(vocab_size=300))
    loaders = data.prepare(**sizes())
    loaders.tokenizer.save(tmp_path / "run")
    batch = loaders.train.batch(0)
    assert load(tmp_path / "run").decode(batch.tokens[0]) == loaders.tokenizer.decode(
        batch.tokens[0]
    )


def test_bad_sizes_are_errors(data):
    for bad, match in (
        ({"seq_len": 1}, "seq_len=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 100000}, "less than one batch of batch_size=100000"),
    ):
        with pytest.raises(DataError, match=match):
            data.prepare(**sizes(**bad))


def test_bad_folders_are_errors(data, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        dataclasses.replace(data, train=TextFiles(path=str(tmp_path / "no"))).prepare(**sizes())
    (tmp_path / "file").write_text("")
    for tokenizer in (ByteTokenizer(), BPE(vocab_size=300)):
        blocked = dataclasses.replace(
            data, cache_dir=str(tmp_path / "file" / "c"), tokenizer=tokenizer
        )
        with pytest.raises(DataError, match="cannot write.*MOEJAX_CACHE"):
            blocked.prepare(**sizes())


def test_default_cache_is_taken_from_the_environment(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path / "from_env"))
    dataclasses.replace(data, cache_dir=None).prepare(**sizes())
    assert (tmp_path / "from_env" / "documents").is_dir()


def test_compression_baselines_are_the_compressors_and_are_kept(data, tmp_path, monkeypatch):
    import gzip
    import lzma

    loaders = data.prepare(**sizes())
    raw = "".join(data.train.documents("eval")).encode()
    got = loaders.compression_baselines()
    assert got["gzip -9"] == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert got["xz -9"] == 8 * len(lzma.compress(raw, preset=9)) / len(raw)
    monkeypatch.setattr(lzma, "compress", None)
    assert data.prepare(**sizes()).compression_baselines() == got


def test_is_a_fiddle_config(folder, tmp_path):
    config = fdl.Config(
        Data,
        train=fdl.Config(TextFiles, path=str(folder), holdout_every=5),
        tokenizer=fdl.Config(ByteTokenizer),
        packing=fdl.Config(ConcatChunk),
        cache_dir=str(tmp_path / "c"),
    )
    config.train.holdout_every = 6
    data = fdl.build(config)
    assert data.train == TextFiles(path=str(folder), holdout_every=6)
    assert data.prepare(**sizes()).tokenizer.vocab_size == 264
    assert str(Data().cache_dir) == "None"  # no machine path in a config's text
