"""Trace files: what is written is read, bit for bit, and whatever is damaged is noticed."""

import dataclasses
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from synthetic_trace import SHAPE, batches, rows, trace_info, write_trace

from moejax.analysis.trace import batch_of_rows, sequence_starts
from moejax.analysis.trace_file import TraceFile, TraceWriter
from moejax.errors import UserError

INFO = trace_info()


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(two, field.name)
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b, err_msg=field.name)


@pytest.mark.parametrize("keep_probs", [False, True])
def test_a_round_trip(tmp_path, keep_probs):
    info = trace_info()
    path = write_trace(tmp_path / "new" / "a.npz", info, keep_probs=keep_probs)
    trace, written = TraceFile(path), batches(info, keep_probs=keep_probs)
    assert trace.info == info
    assert trace.has_probs == keep_probs
    assert_same_batches(list(trace.batches()), written)
    assert trace.num_tokens == sum(len(b.tokens) for b in written)
    assert trace.num_sequences == trace.num_documents == 18
    assert [path.name for path in path.parent.iterdir()] == ["a.npz"]


def test_numpy_opens_it_without_moejax(tmp_path):
    with np.load(write_trace(tmp_path / "a.npz")) as file:
        experts = file["00000001/experts"]
        assert json.loads(file["trace.json"])["info"]["num_experts"] == 8
    np.testing.assert_array_equal(experts, batches(trace_info())[1].experts)


def test_the_same_trace_has_the_same_bytes(tmp_path):
    one, two = (write_trace(tmp_path / name).read_bytes() for name in ("a.npz", "b.npz"))
    assert one == two
    assert one != write_trace(tmp_path / "c.npz", seed=1).read_bytes()


def peak_bytes(path, count):
    """Of writing and reading a trace of `count` equal batches of 8 sequences."""
    (batch,) = batches(INFO, count=1, batch_size=4, sequence_length=2560)
    tracemalloc.start()
    with TraceWriter(path, INFO) as writer:
        for number in range(count):
            documents = np.arange(8 * number, 8 * number + 8, dtype=np.int32)
            writer.add(dataclasses.replace(batch, documents=documents))
    for _ in TraceFile(path).batches():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_one_batch_is_in_memory_at_a_time(tmp_path):
    few, many = (peak_bytes(tmp_path / "a.npz", count) for count in (2, 20))
    assert (tmp_path / "a.npz").stat().st_size > 1.5 * many
    assert many - few < 0.5 * few  # the archive's table of contents grows


def test_padding_is_not_in_a_trace():
    """The rows hold NaN there."""
    info = trace_info()
    given = rows(info, np.random.default_rng(0), first=0, **SHAPE)
    batch = batch_of_rows(info, **given, keep_probs=True)
    real = given["segment_ids"].reshape(-1) > 0
    assert len(batch.tokens) == real.sum() < real.size
    np.testing.assert_array_equal(batch.tokens, given["tokens"].reshape(-1)[real])
    assert batch.experts.dtype == np.uint8
    assert batch.experts[0, 0, -1] == 8  # -1 of the router: the empty slot
    np.testing.assert_array_equal(batch.experts[1:], given["experts"][1:, real])
    weights, exact = batch.weights, given["weights"][:, real]
    assert np.abs(weights - exact).max() <= 2**-11
    for name in ("sequence_probs", "sequence_entropy", "probs"):
        assert np.isfinite(getattr(batch, name)).all()


def test_means_are_those_of_each_sequence():
    info = trace_info()
    given = rows(info, np.random.default_rng(0), first=0, **SHAPE)
    batch = batch_of_rows(info, **given)
    probs = given["probs"].reshape(3, *given["tokens"].shape, 8).astype(np.float64)
    number = 0
    for row, ids in enumerate(given["segment_ids"]):
        for segment in (1, 2):
            own = probs[:, row, ids == segment]
            assert batch.lengths[number] == own.shape[1]
            np.testing.assert_allclose(batch.sequence_probs[:, number], own.mean(1), rtol=1e-6)
            entropy = -(own * np.log(own)).sum(-1).mean(1)
            np.testing.assert_allclose(batch.sequence_entropy[:, number], entropy, rtol=1e-6)
            number += 1
    assert number == len(batch.lengths)


def test_a_sequence_ends_with_its_row_or_its_segment():
    segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 2]])
    assert sequence_starts(segments).tolist() == [0, 2, 3, 7, 8]


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.uint32)]
)
def test_ids_take_as_few_bytes_as_hold_the_empty_slot(num_experts, dtype):
    assert trace_info(num_experts=num_experts).expert_dtype == dtype


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_weights_that_float16_cannot_hold_are_refused(value):
    info = trace_info()
    given = rows(info, np.random.default_rng(0), first=0, **SHAPE)
    given["weights"][1, 0, 0] = value
    with pytest.raises(ValueError, match="combine weight is not finite"):
        batch_of_rows(info, **given)


def test_nothing_is_left_of_a_trace_that_failed(tmp_path):
    path = write_trace(tmp_path / "a.npz")
    before = path.read_bytes()
    other = batches(trace_info(), keep_probs=True)[0]
    with pytest.raises(ValueError, match="this trace holds"), TraceWriter(path, INFO) as writer:
        [writer.add(batch) for batch in (batches(INFO)[0], other)]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="experts is"), TraceWriter(path, trace_info(k=3)) as w:
        w.add(batches(INFO)[0])
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_noticed(tmp_path, keep):
    path = write_trace(tmp_path / "a.npz")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match="no trace, or was cut off"):
        TraceFile(path)


def test_any_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    path = write_trace(tmp_path / "a.npz", count=1, batch_size=1)
    data, whole = path.read_bytes(), list(TraceFile(path).batches())
    info, rng, noticed = TraceFile(path).info, np.random.default_rng(0), 0
    for at in rng.choice(len(data), 300, replace=False):
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            trace = TraceFile(path)
            found = list(trace.batches())
        except UserError:
            noticed += 1
            continue
        assert trace.info == info
        assert_same_batches(found, whole)
    assert noticed > 200


def changed(path, member, data):
    """Rewrites one member (None removes it), checksums and all: a file made by someone else."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    content[member] = data
    with zipfile.ZipFile(path, "w") as file:
        for name, value in content.items():
            if value is not None:
                file.writestr(name, value)
    return path


def header(path, **totals):
    with zipfile.ZipFile(path) as file:
        content = json.loads(file.read("trace.json"))
    content["totals"] |= totals
    return json.dumps(content).encode()


def test_foreign_files_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the trace .*: No such file"):
        TraceFile(tmp_path / "none.npz")
    with pytest.raises(UserError, match="cannot read the trace .*: Is a directory"):
        TraceFile(tmp_path)
    np.savez(tmp_path / "other.npz", x=np.arange(3))
    with pytest.raises(UserError, match=r"other\.npz is an archive but no trace"):
        TraceFile(tmp_path / "other.npz")
    path = changed(write_trace(tmp_path / "a.npz"), "trace.json", b'{"format": "moejax-trace-9"}')
    with pytest.raises(UserError, match="has format 'moejax-trace-9'"):
        TraceFile(path)


def test_files_that_contradict_themselves_are_named(tmp_path):
    path = changed(write_trace(tmp_path / "a.npz"), "00000001/experts.npy", None)
    with pytest.raises(UserError, match=r"00000001/experts\.npy is missing"):
        TraceFile(path)
    path = changed(write_trace(path), "00000000/tokens.npy", b"nonsense")
    with pytest.raises(UserError, match=r"is damaged \(00000000/tokens\.npy"):
        list(TraceFile(path).batches())
    path = changed(write_trace(path), "trace.json", header(path, num_tokens=10**6))
    with pytest.raises(UserError, match="it holds 315 of 1000000 tokens"):
        list(TraceFile(path).batches())
    path = changed(write_trace(path), "trace.json", header(write_trace(path), num_documents=3))
    with pytest.raises(UserError, match="documents are not numbered in order below 3"):
        list(TraceFile(path).batches())
    path = changed(write_trace(path), "trace.json", header(write_trace(path), num_tokens=0))
    with pytest.raises(UserError, match="holds no token"):
        TraceFile(path)
