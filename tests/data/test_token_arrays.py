import numpy as np
import pytest

from moejax.data import (
    BPE,
    ByteTokenizer,
    Data,
    DataError,
    TextFiles,
    TokenArrays,
    write_token_arrays,
)
from moejax.data.tokenizer import Bytes


def documents(n):
    return [(np.arange(i % 7 + 1, dtype=np.int64) + i) % 250 for i in range(n)]


def test_round_trip_over_several_files(tmp_path):
    docs = documents(50)
    assert write_token_arrays(str(tmp_path), docs, vocab_size=264, records_per_file=20) == 50
    assert len(list(tmp_path.glob("*.array_record"))) == 3
    source = TokenArrays(path=str(tmp_path), holdout_every=5)
    out = {s: [d.tolist() for d in source.documents(s)] for s in ("train", "eval")}
    assert next(source.documents("train")).dtype == np.int32
    assert sorted(out["train"] + out["eval"]) == sorted(d.tolist() for d in docs)
    assert out["eval"]
    assert out["train"] == [d for d in map(np.ndarray.tolist, docs) if d in out["train"]]


def test_the_same_batches_as_from_text(folder, tmp_path):
    text = TextFiles(path=str(folder), holdout_every=5)
    tokens = [Bytes().encode(t) for s in ("train", "eval") for t in text.documents(s)]
    path = str(tmp_path / "arrays")
    write_token_arrays(path, tokens, vocab_size=264, tokenizer=Bytes().fingerprint())
    loaders = Data(
        train=TokenArrays(path=path), tokenizer=ByteTokenizer(), cache_dir=str(tmp_path / "c")
    ).prepare(seq_len=32, batch_size=4, seed=0)
    assert loaders.num_train_tokens + loaders.num_held_out_tokens == sum(len(t) + 1 for t in tokens)
    assert loaders.held_out_bytes == sum(len(t.encode()) for t in loaders.held_out_texts())


def test_another_tokenizer_is_an_error(tmp_path):
    path = str(tmp_path / "a")
    write_token_arrays(path, documents(50), vocab_size=264, tokenizer="0123")
    data = Data(train=TokenArrays(path=path), tokenizer=ByteTokenizer(), cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="another tokenizer"):
        data.prepare(seq_len=8, batch_size=2, seed=0)
    bpe = Data(train=TokenArrays(path=path), tokenizer=BPE(vocab_size=300), cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="cannot be trained on token arrays"):
        bpe.prepare(seq_len=8, batch_size=2, seed=0)


def test_ids_outside_the_vocabulary_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"outside \[0, 10\)"):
        write_token_arrays(str(tmp_path / "a"), [np.array([3, 10])], vocab_size=10)
    path = str(tmp_path / "b")
    write_token_arrays(path, [np.array([1, 500])] * 40, vocab_size=512)
    data = Data(train=TokenArrays(path=path), tokenizer=ByteTokenizer(), cache_dir=str(tmp_path))
    with pytest.raises(DataError, match="token id 500"):
        data.prepare(seq_len=8, batch_size=2, seed=0)


def test_damaged_and_missing_files_are_named(tmp_path):
    write_token_arrays(str(tmp_path), documents(200), vocab_size=264)
    with pytest.raises(DataError, match="already holds"):
        write_token_arrays(str(tmp_path), documents(2), vocab_size=264)
    (file,) = tmp_path.glob("*.array_record")
    before = TokenArrays(path=str(tmp_path)).fingerprint("train")
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 3])
    assert TokenArrays(path=str(tmp_path)).fingerprint("train") != before
    with pytest.raises(DataError, match="part-00000"):
        list(TokenArrays(path=str(tmp_path)).documents("train"))
    (tmp_path / "token_arrays.json").unlink()
    with pytest.raises(DataError, match=r"token_arrays\.json"):
        TokenArrays(path=str(tmp_path)).manifest()
