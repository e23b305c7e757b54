"""Records on disk: valid JSON, no step twice, nothing lost to a kill."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import crc32c  # noqa: F401  (the format's own check)

from moejax.analysis.metrics_file import read_metrics
from moejax.errors import UserError
from moejax.train.progress import Progress
from moejax.train.writers import JsonLines, TensorBoard, recorded


def record(step, kind="train", **values):
    return {"kind": kind, "step": step, "time": 1000.0 + step, "values": values or {"loss": 1.5}}


def write(path, records, **options):
    writer = JsonLines(path, **options)
    for r in records:
        writer.write(r)
    writer.close()


def test_round_trip_of_arrays_and_values_that_are_not_finite(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    values = {
        "loss": jnp.float32(np.nan),
        "up": np.inf,
        "load": jnp.asarray([[0.5, -np.inf], [1.0, 2.0]]),
        "half": jnp.bfloat16(0.5),
        "count": np.int64(3),
        "nested": [1.0, [jnp.float32(2.0)]],
    }
    write(path, [record(jnp.int32(7), **values), record(0, "event", text="resumed")])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = read_metrics(path)
    assert first["step"] == 7
    assert first["time"] == 1007.0
    found = first["values"]
    assert np.isnan(found["loss"])
    assert found["up"] == np.inf
    assert found["load"] == [[0.5, -np.inf], [1.0, 2.0]]
    assert (found["half"], found["count"], found["nested"]) == (0.5, 3, [1.0, [2.0]])
    assert isinstance(found["count"], int)
    assert second["values"] == {"text": "resumed"}


def test_resume_leaves_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [record(s) for s in range(1, 31)]
    write(
        path, [record(0, "run", seed=1), *first, record(30, "eval"), record(25, "event", text="x")]
    )
    write(path, [record(s) for s in range(21, 31)], resume_step=20)
    found = read_metrics(path)
    assert [r["step"] for r in found if r["kind"] == "train"] == list(range(1, 31))
    assert not [r for r in found if r["kind"] == "eval"]
    assert [r["kind"] for r in found if r["kind"] in ("run", "event")] == ["run", "event"]
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_opening_without_resume_keeps_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1), record(2)])
    write(path, [record(3)])
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 40])
@pytest.mark.parametrize("resume_step", [None, 1])
def test_torn_last_line(tmp_path, cut, resume_step):
    path = tmp_path / "metrics.jsonl"
    write(path, [record(1), record(2)])
    path.write_bytes(path.read_bytes()[:-cut])
    write(path, [record(2)], resume_step=resume_step)
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")
    writer = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="record kind 'test'"):
        writer.write(record(1, "test"))
    with pytest.raises(ValueError, match="a metric must be"):
        writer.write(record(1, loss=object()))
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def events(directory):
    """(tag, step, value) of every scalar in the files, oldest first."""
    found = []
    for file in sorted(directory.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


def test_tensorboard(tmp_path):
    writer = TensorBoard(tmp_path)
    writer.write(record(5, loss=jnp.float32(1.5), load=[3.0, 1.0, np.nan, 2.0], none=[np.nan]))
    writer.write(record(5, "eval", bits=np.nan, text="x"))
    writer.write(record(5, "event", text="not drawn"))
    writer.close()
    found = events(tmp_path)
    assert found[:4] == [
        ("train/loss", 5, 1.5),
        ("train/load/min", 5, 1.0),
        ("train/load/median", 5, 2.0),
        ("train/load/max", 5, 3.0),
    ]
    assert len(found) == 4  # NaN cannot be drawn; the JSON lines keep it


def test_tensorboard_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write TensorBoard"):
        TensorBoard(tmp_path / "file" / "tb")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_is_few_plain_lines():
    stream = io.StringIO()
    with Progress(100, initial=10, stream=stream, line_seconds=1000.0) as progress:
        for step in range(11, 91):
            progress.update(step, loss=2.5, tokens_per_second=12345.6)
        progress.message("saved")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # the first, the message, and the last at the end
    assert lines[0].startswith("step 11/100  loss 2.5000  12,346 tokens/s  ETA ")
    assert lines[1] == "saved"
    assert lines[2].startswith("step 90/100")
    assert "\r" not in stream.getvalue()


def test_progress_prints_the_last_step_once():
    stream = io.StringIO()
    with Progress(3, stream=stream, line_seconds=0.0) as progress:
        for step in (1, 2, 3):
            progress.update(step, loss=float("nan"), tokens_per_second=0.0)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert lines[-1].endswith("ETA 00:00")
    assert "loss nan" in lines[0]


def test_progress_on_a_terminal_is_one_live_line():
    stream = Terminal()
    with Progress(10, initial=4, stream=stream) as progress:
        for step in range(5, 11):
            progress.update(step, loss=step / 2, tokens_per_second=1000.0)
        progress.message("hello")
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("step 10/10 ")
    assert "loss 5.0000  1,000 tokens/s" in last
    assert "hello" in stream.getvalue()


def test_an_evaluation_that_is_made_again_is_not_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [record(s, kind) for s in (1, 2, 3) for kind in ("train", "eval")])
    assert recorded(path, "eval", 3)
    write(path, [record(3, "eval")], resume_step=3, last_eval=2)
    found = [(r["kind"], r["step"]) for r in read_metrics(path)]
    assert found == [(k, s) for s in (1, 2, 3) for k in ("train", "eval")]
    write(path, [], resume_step=1)
    assert not recorded(path, "eval", 3)
    assert recorded(path, "eval", 1)
    assert not recorded(tmp_path / "nowhere.jsonl", "eval", 1)
