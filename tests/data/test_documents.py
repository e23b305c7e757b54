import logging

import numpy as np
import pytest

from moejax.data import DataError, TextFiles, TokenArrays, write_token_arrays
from moejax.data.documents import token_dtype, tokenized
from moejax.data.tokenizer import Bytes


def test_stream_layout(tmp_path):
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / name).write_text(name[0] * 3)
    source = TextFiles(path=str(tmp_path), holdout_every=1000)
    docs = tokenized(source, "train", Bytes(), str(tmp_path / "c"))
    texts = list(source.documents("train"))
    eos = Bytes.eos_id
    expected = [eos]
    for t in texts:
        expected += [*t.encode(), eos]
    np.testing.assert_array_equal(docs.tokens, expected)
    np.testing.assert_array_equal(docs.offsets, [0, 4, 8][: len(texts) + 1])
    assert docs.num_bytes == 3 * len(texts)


def test_many_groups_give_the_same_stream_as_one(folder, tmp_path, monkeypatch):
    source = TextFiles(path=str(folder))
    whole = tokenized(source, "train", Bytes(), str(tmp_path / "c1"))
    monkeypatch.setattr("moejax.data.documents._ENCODE_BYTES", 100)
    parts = tokenized(source, "train", Bytes(), str(tmp_path / "c2"))
    np.testing.assert_array_equal(whole.tokens, parts.tokens)
    np.testing.assert_array_equal(whole.offsets, parts.offsets)
    assert (
        whole.num_bytes
        == parts.num_bytes
        == sum(len(t.encode()) for t in source.documents("train"))
    )


def test_an_edited_file_is_tokenised_again(folder, tmp_path):
    source = TextFiles(path=str(folder))
    before = tokenized(source, "train", Bytes(), str(tmp_path / "c"))
    _, path = source._split("train")[7]
    path.write_text("new text")
    after = tokenized(source, "train", Bytes(), str(tmp_path / "c"))
    assert before.fingerprint != after.fingerprint
    begin, end = after.offsets[7:9]
    assert Bytes().decode(after.tokens[begin + 1 : end]) == "new text"


def test_a_tokenizer_that_loses_text_is_reported(folder, tmp_path, caplog):
    class Lossy(Bytes):
        def spec(self):
            return {"kind": "lossy"}

        def encode(self, text):
            return super().encode(text)[1:]

    source = TextFiles(path=str(folder))
    with caplog.at_level(logging.WARNING):
        docs = tokenized(source, "train", Lossy(), str(tmp_path / "c"))
    assert "does not keep text exactly" in caplog.text
    assert docs.num_bytes == sum(len(t.encode()) for t in source.documents("train"))


def test_dtype_fits_the_vocabulary():
    assert token_dtype(2**16).itemsize == 2
    assert token_dtype(2**16 + 1).itemsize == 4
    with pytest.raises(DataError, match="int32"):
        token_dtype(2**31)


@pytest.mark.parametrize("where", [0, 2])
def test_a_document_that_holds_the_end_token_is_refused(where, tmp_path):
    documents = [np.full(3, 65) for _ in range(8)]
    documents[5] = documents[5].copy()
    documents[5][where] = Bytes.eos_id
    write_token_arrays(str(tmp_path / "t"), documents, vocab_size=Bytes.vocab_size)
    source = TokenArrays(path=str(tmp_path / "t"), holdout_every=1000)
    message = f"holds the end token, id {Bytes.eos_id}, at position {where} of 3"
    both = lambda: [tokenized(source, s, Bytes(), str(tmp_path / "c")) for s in ("train", "eval")]
    with pytest.raises(DataError, match=message):
        both()
