"""Reading metrics.jsonl as crashes and resumes leave it."""

import json
import math

import pytest

from moejax.analysis.metrics_file import iter_metrics, read_metrics
from moejax.errors import UserError


def line(step, kind="train", **values):
    return json.dumps({"kind": kind, "step": step, "time": 1.0, "values": values}) + "\n"


def write(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_records_in_order(tmp_path):
    path = write(tmp_path, line(0, "run", name="nan") + line(10, loss=2.5) + "\n" + line(20))
    records = read_metrics(path)
    assert [(r["kind"], r["step"]) for r in records] == [("run", 0), ("train", 10), ("train", 20)]
    assert records[0]["values"]["name"] == "nan"
    assert list(iter_metrics(path)) == records


def test_words_for_numbers_become_floats(tmp_path):
    values = {"a": "nan", "b": ["inf", ["-inf", 1.0]], "c": float("nan")}
    record = read_metrics(write(tmp_path, line(1, **values)))[0]["values"]
    assert math.isnan(record["a"])
    assert record["b"] == [math.inf, [-math.inf, 1.0]]
    assert math.isnan(record["c"])


def test_words_in_texts_stay_words(tmp_path):
    path = write(tmp_path, line(1, "event", event="finished", sample="nan", xz="nan"))
    values = read_metrics(path)[0]["values"]
    assert values["sample"] == "nan"
    assert math.isnan(values["xz"])


@pytest.mark.parametrize("cut", [1, 15, 60])
def test_torn_last_line_is_left_out(tmp_path, cut):
    path = write(tmp_path, line(10) + line(20, loss=1.0, text="x" * 60)[:cut])
    assert [r["step"] for r in read_metrics(path)] == [10]


def test_torn_line_followed_by_a_resumed_record(tmp_path):
    path = write(tmp_path, line(10) + line(20, loss=1.0)[:25] + line(10, "event", event="resumed"))
    first, warning, resumed = read_metrics(path)
    assert first["step"] == 10
    assert "line 2 of metrics.jsonl" in warning["values"]["text"]
    assert resumed["values"]["event"] == "resumed"


@pytest.mark.parametrize("junk", ["[1, 2]\n", '{"kind": "train"}\n', '{"kind": "train", "st\n'])
def test_unreadable_line_becomes_a_warning(tmp_path, junk):
    records = read_metrics(write(tmp_path, line(10) + junk + line(20)))
    assert [r["step"] for r in records] == [10, 10, 20]
    assert records[1]["values"]["event"] == "warning"


def test_empty_file_has_no_records(tmp_path):
    assert read_metrics(write(tmp_path, "")) == []


def test_another_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="is not a metrics file"):
        read_metrics(write(tmp_path, b"\x00\xff\n\x89PNG\n"))


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.jsonl: No such file"):
        read_metrics(tmp_path / "none.jsonl")
