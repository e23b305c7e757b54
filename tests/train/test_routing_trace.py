"""A recorded trace holds what the model's layers chose, layer by layer, and no padding."""

import functools

import jax
import numpy as np
import pytest

from moejax.analysis.trace import TraceInfo, sequence_starts
from moejax.analysis.trace_file import TraceFile
from moejax.balance.unbalanced import Unbalanced
from moejax.data import ByteTokenizer, Data, Mixture, TextFiles
from moejax.errors import UserError
from moejax.models.output import Output
from moejax.parallel.mesh import Mesh
from moejax.train import routing_trace
from moejax.train.text_rows import TextRows
from moejax.verification.contracts.cases import quick_jit
from tests.models.tiny_model import VOCAB, attention, moe, random_model_variables, tiny


@pytest.fixture(scope="module")
def model():
    """Windows alternate, so layers 0 and 2 are one stack, and 1 and 3 the other."""
    return tiny(
        num_layers=4,
        windows=(None, 2),
        attention=attention(qk_norm=None),
        ffn=moe(balance=(Unbalanced(),), shared=None),
    )


@pytest.fixture(scope="module")
def variables(model):
    return random_model_variables(model)


def some_rows(count=2):
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 2, 0, 0, 0, 0]], np.int32)
    for n in range(count):
        tokens = rng.integers(1, VOCAB, segments.shape).astype(np.int32)
        tokens[segments == 0] = 0
        yield TextRows(
            tokens=tokens,
            segment_ids=segments,
            positions=np.array([[0, 1, 2, 0, 1, 0], range(6), [0] * 6], np.int32),
            documents=np.arange(5 * n, 5 * n + 5, dtype=np.int32),
            sources=np.zeros(5, np.int32),
        )


@functools.cache
def info_of(model):
    return TraceInfo(
        num_experts=4,
        k=routing_trace.choices_per_token(model),
        layers=tuple(model.moe_layers),
        sequence_length=6,
        tokenizer="t",
        sources=("x",),
        documents="texts",
        weights={},
        config="",
        versions={},
    )


def recorded(path, model, variables, rows, mesh, **options):
    with jax.set_mesh(mesh):
        return routing_trace.record(path, info_of(model), model, variables, rows, mesh, **options)


def test_the_trace_is_that_of_every_layer(model, variables, tmp_path):
    path, mesh = tmp_path / "a.npz", Mesh(data=1).build()
    written = recorded(path, model, variables, some_rows(), mesh, keep_probs=True)
    trace = TraceFile(path)
    assert trace.info.layers == (0, 1, 2, 3)
    assert trace.info.k == 2
    assert written.num_tokens == trace.num_tokens == 26

    def alone(tokens, segment_ids, positions) -> Output:
        return model.apply(
            variables, tokens, segment_ids=segment_ids, positions=positions, record=True
        )

    alone = quick_jit(alone)
    for part, batch in zip(some_rows(), trace.batches(), strict=True):
        stats = alone(part.tokens, part.segment_ids, part.positions).stats
        real = part.segment_ids.reshape(-1) > 0
        np.testing.assert_array_equal(batch.tokens, part.tokens.reshape(-1)[real])
        assert batch.lengths.tolist() == [3, 2, 6, 1, 1]
        where = [("layers_0", 0), ("layers_1", 0), ("layers_0", 1), ("layers_1", 1)]
        for row, layer in enumerate(trace.info.layers):
            name, number = where[layer]
            own = {k: np.asarray(v[number])[real] for k, v in stats[name]["trace"].items()}
            np.testing.assert_array_equal(batch.experts[row], own["experts"])
            np.testing.assert_allclose(batch.weights[row], own["weights"], rtol=2**-11, atol=1e-6)
            np.testing.assert_allclose(batch.probs[row], own["probs"], rtol=2**-11, atol=1e-6)
            np.testing.assert_allclose(
                batch.sequence_probs[row, 2], own["probs"][5:11].mean(0), rtol=1e-5
            )
    # Layers differ, or their order would not have been tested.
    assert len({own.tobytes() for own in batch.experts}) == 4


def test_a_limit_stops_after_the_batch_that_reaches_it(model, variables, tmp_path):
    mesh = Mesh(data=1).build()
    for limit, expected in ((1, 13), (13, 13), (14, 26)):
        path = tmp_path / f"{limit}.npz"
        recorded(path, model, variables, some_rows(3), mesh, max_tokens=limit)
        assert TraceFile(path).num_tokens == expected


def test_no_text_and_broken_weights_leave_no_file(model, variables, tmp_path):
    mesh = Mesh(data=1).build()
    with pytest.raises(UserError, match="no text to trace"):
        recorded(tmp_path / "a.npz", model, variables, [], mesh)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    with pytest.raises(UserError, match="not finite"):
        recorded(tmp_path / "a.npz", model, broken, some_rows(), mesh)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_devices_record_the_same(model, variables, tmp_path):
    found = []
    for name, mesh in (("one.npz", Mesh(data=1)), ("three.npz", Mesh(data=3))):
        recorded(tmp_path / name, model, variables, some_rows(1), mesh.build())
        found += TraceFile(tmp_path / name).batches()
    one, three = found
    np.testing.assert_array_equal(one.experts, three.experts)
    np.testing.assert_allclose(one.sequence_probs, three.sequence_probs, rtol=1e-5)


def test_held_out_rows_say_which_source_each_sequence_is_of(tmp_path):
    sources = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(6):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number} " * (3 + number))
        sources.append(TextFiles(path=str(tmp_path / name), pattern="*.txt", holdout_every=2))
    data = Data(
        train=Mixture(sources=tuple(sources), weights=(1.0, 1.0)),
        tokenizer=ByteTokenizer(),
        cache_dir=str(tmp_path / "cache"),
    ).prepare(seq_len=32, batch_size=2, seed=0)
    found, documents = set(), []
    for rows in routing_trace.held_out_rows(data):
        real = rows.segment_ids > 0
        starts = sequence_starts(rows.segment_ids)
        for source, tokens in zip(
            rows.sources, np.split(rows.tokens[real], starts[1:]), strict=True
        ):
            found |= {(int(source), chr(t)) for t in tokens if chr(t) in "ab"}
        documents += rows.documents.tolist()
    assert found == {(0, "a"), (1, "b")}
    assert documents == list(range(len(documents)))
