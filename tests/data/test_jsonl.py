import gzip
import json
import logging

import pytest

from moejax.data import DataError, JsonLines


def write(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")


def test_every_line_is_in_one_split_and_order_is_kept(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(40)])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write("".join(json.dumps({"text": f"b{i}"}) + "\n\n" for i in range(40)))
    source = JsonLines(path=str(tmp_path), holdout_every=4)
    train, held = (list(source.documents(s)) for s in ("train", "eval"))
    expected = [f"a{i}" for i in range(40)] + [f"b{i}" for i in range(40)]
    assert [t for t in expected if t in set(train)] == train
    assert sorted(train + held) == sorted(expected)
    assert 8 <= len(held) <= 35


def test_bad_lines_are_skipped_with_one_warning(tmp_path, caplog):
    good = [{"body": f"x{i}"} for i in range(20)]
    path = tmp_path / "a.jsonl"
    write(path, [good[0], "{not json", {"other": 1, "more": 2}, {"body": 7}, "[1]", *good[1:]])
    with caplog.at_level(logging.WARNING):
        texts = list(JsonLines(path=str(path), field="body", holdout_every=1000).documents("train"))
    assert 18 <= len(texts) <= 20
    (message,) = [r.getMessage() for r in caplog.records]
    assert "skipped 4 lines" in message
    assert "a.jsonl:2 (not JSON)" in message


def test_a_wrong_field_name_is_an_error(tmp_path):
    write(tmp_path / "a.jsonl", [{"content": "x"}] * 30)
    with pytest.raises(DataError, match="'text'"):
        list(JsonLines(path=str(tmp_path)).documents("train"))
    with pytest.raises(DataError, match="does not exist"):
        JsonLines(path=str(tmp_path / "no.jsonl")).fingerprint("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \*\.jsonl"):
        JsonLines(path=str(tmp_path / "empty")).fingerprint("train")


def test_truncated_gzip_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    raw = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        list(JsonLines(path=str(path)).documents("train"))


def test_lone_surrogates_become_valid_text(tmp_path):
    write(tmp_path / "a.jsonl", ['{"text": "a\\ud800b"}'] * 30)
    assert next(iter(JsonLines(path=str(tmp_path)).documents("train"))).encode() == b"a?b"


def test_fingerprint_depends_on_content_field_and_split(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [{"text": f"a{i}"} for i in range(9)])
    source = JsonLines(path=str(path))
    seen = {source.fingerprint("train"), source.fingerprint("eval")}
    seen.add(JsonLines(path=str(path), field="b").fingerprint("train"))
    path.write_text(path.read_text().replace("a3", "b3"))
    seen.add(source.fingerprint("train"))
    assert len(seen) == 4


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(40)])
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as f:
        f.write((tmp_path / "a.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"holds a.jsonl and a.jsonl.gz, the same lines twice"):
        JsonLines(path=str(tmp_path)).fingerprint("train")
