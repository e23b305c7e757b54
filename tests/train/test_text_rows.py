"""Texts as rows: every token once, each document begun as in training, nothing across documents."""

import numpy as np
import pytest

from moejax.data.tokenizer import Bytes
from moejax.errors import UserError
from moejax.train.text_rows import Text, read_files, read_lines, rows_of_texts

EOS = Bytes().eos_id


def rows_of(*texts, batch_size=2, sequence_length=8):
    given = [Text(text=text, source=n % 2) for n, text in enumerate(texts)]
    shape = {"batch_size": batch_size, "sequence_length": sequence_length}
    return list(rows_of_texts(given, Bytes(), beginning=(EOS,), **shape))


def documents_in(batches):
    """{document: its ids, sequence after sequence}."""
    found = {}
    for batch in batches:
        number = 0
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(1, segments.max() + 1):
                own = segments == segment
                assert np.diff(np.flatnonzero(own)).tolist() == [1] * (own.sum() - 1)
                assert batch.positions[row][own].tolist() == list(range(own.sum()))
                found.setdefault(int(batch.documents[number]), []).extend(batch.tokens[row][own])
                assert batch.sources[number] == batch.documents[number] % 2
                number += 1
        assert number == len(batch.documents)
    return found


def test_every_document_is_there_once_and_begins_with_the_end_token():
    texts = ["ab", "c" * 20, "", "déf", "g" * 7, "h"]
    found = documents_in(rows_of(*texts))
    assert found == {n: [EOS, *text.encode()] for n, text in enumerate(texts)}


def test_what_fits_shares_a_row_and_what_does_not_begins_the_next():
    (batch,) = rows_of("ab", "cd", "efg")
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.tokens[batch.segment_ids == 0].tolist() == [0] * 6
    assert len(rows_of("a" * 7, "b" * 7, "c" * 7)) == 2
    assert len(rows_of("a" * 15)) == 1
    assert rows_of() == []


def test_lines_pair_with_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\nzwei\u2028drei\nlast".encode())
    assert [t.text for t in read_lines([path])] == ["one", "zwei\u2028drei", "last"]
    path.write_text("one\ntwo\n")
    assert [t.text for t in read_lines([path, path])] == ["one", "two"] * 2
    assert [t.source for t in read_files([path, path])] == [0, 1]
    path.write_text("one\n\nthree")
    with pytest.raises(UserError, match=r"line 2 of .*a\.txt is blank"):
        list(read_lines([path]))


def test_what_is_no_text_is_named(tmp_path):
    path = tmp_path / "a.txt"
    for data, message in ((b"ab\xff", r"a\.txt is no UTF-8 text \(byte 2\)"), (b"", "is empty")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            list(read_files([path]))
    with pytest.raises(UserError, match=r"cannot read .*none: No such file"):
        list(read_files([tmp_path / "none"]))
