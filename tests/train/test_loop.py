"""The loop as a whole: resume, pauses, the order of what is written, foreign data, warnings."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.fingerprint import held_out
from moejax.errors import UserError
from moejax.parallel.exchange import BACKENDS
from moejax.train.checkpoint import Checkpointer
from moejax.train.layout import one_device
from moejax.train.loop import train
from moejax.train.restore import CHECKPOINTS, TOKENIZER, load_variables
from moejax.train.state import init_state
from moejax.transport.least_loaded import LeastLoaded
from tests.train.smoke_runs import build, records


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    """(the smoke experiment as it is, what its training returned)."""
    experiment = build(tmp_path_factory.mktemp("finished") / "run", cache)
    return experiment, train(experiment, name="run")


def final_state(experiment, step):
    """Every leaf of a checkpoint, by path."""
    data = experiment.prepare_data()
    model = experiment.build_model(data.tokenizer.vocab_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    optimizer = experiment.optimizer.build(shapes, experiment.steps)
    fresh = jax.eval_shape(lambda: init_state(model, optimizer, experiment.guard, 0))
    with Checkpointer(f"{experiment.workdir}/{CHECKPOINTS}") as checkpointer:
        state = checkpointer.restore(one_device(fresh), step).state
    return jax.tree_util.tree_leaves_with_path(state)


def assert_bit_equal(left, right):
    for (path, a), (_, b) in zip(left, right, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


STEPS = ("steps=6", "log_every=2", "optimizer.schedule.warmup_steps=2")


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(smoke):
    whole, parts = smoke("whole", *STEPS), smoke("parts", *STEPS)
    assert train(whole, name="whole").step == 6
    paused = train(parts, name="parts", until=3)
    assert (paused.step, paused.paused_by) == (3, "--until 3")
    assert paused.results == {}
    finished = train(parts, name="parts")
    assert finished.paused_by is None
    assert_bit_equal(final_state(whole, 6), final_state(parts, 6))
    steps = [r["step"] for r in records(parts) if r["kind"] == "train"]
    assert steps == sorted(set(steps))


def test_held_out_batches_are_as_large_as_a_microbatch(smoke):
    data = smoke("parts", "batch_size=8", "num_microbatches=4").prepare_data()
    assert (data.train.batch_size, data.eval.batch_size) == (8, 2)


@pytest.mark.slow
def test_a_pause_that_an_earlier_session_came_to_stays_one(smoke):
    experiment = smoke("paused", *STEPS)
    for _ in range(2):
        paused = train(experiment, name="paused", until=2)
        assert (paused.step, paused.paused_by) == (2, "--until 2")
    assert train(experiment, name="paused").step == 6


def test_a_finished_run_evaluates_again_and_trains_nothing(finished):
    experiment, first = finished
    again = train(experiment, name="run")
    assert again.step == first.step == experiment.steps
    assert again.results["eval/loss"] == first.results["eval/loss"]


def test_results_hold_the_figures_beside_those_of_compressors(finished):
    results = finished[1].results
    assert 0 < results["eval/bits_per_byte"] < 9  # a uniform byte model has 8.01
    assert 0 < results["xz_bits_per_byte"] < 8
    assert 0 < results["gzip_bits_per_byte"] < 8
    assert results["sample"]


@pytest.mark.slow
def test_a_step_is_recorded_before_it_is_saved(smoke, monkeypatch):
    """Or a kill behind the save would lose the record: a resumed run does not make it again."""
    experiment, save, seen = smoke("order", "steps=5", "checkpoint_every=2"), Checkpointer.save, []

    def checked(self, step, *args):
        if "checkpoints" in str(self.directory.root):
            seen.append(step)
            assert step in [r["step"] for r in records(experiment) if r["kind"] == "train"]
        return save(self, step, *args)

    monkeypatch.setattr(Checkpointer, "save", checked)
    train(experiment, name="order")
    assert seen == [2, 4, 5]


@pytest.mark.slow
def test_other_data_than_the_checkpoints_are_refused(smoke):
    train(smoke("data"), name="run", until=2)
    with pytest.raises(UserError, match="trained on other data"):
        train(smoke("data", "seed=5"), name="run")


def files_of(folder):
    source = "data.train=moejax.data.source:TextFiles"
    return source, f"data.train.path={folder}", "data.train.pattern=*.py"


@pytest.mark.slow
def test_other_held_out_data_than_the_checkpoints_are_refused(smoke, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        words = "".join(f"def name_{n}(x): return x + {n * number}\n" for n in range(40))
        (folder / f"{number}.py").write_text(words)
    run = lambda: smoke("held out", *files_of(folder))
    train(run(), name="run", until=2)
    files = sorted(folder.iterdir())
    every = run().data.train.holdout_every
    for index in np.flatnonzero(held_out([path.name for path in files], every)):
        files[index].write_text("another text, as long as it takes")
    with pytest.raises(UserError, match="evaluated on other held-out data"):
        train(run(), name="run")


@pytest.mark.slow
def test_a_refused_run_keeps_its_tokenizer(smoke, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.py").write_text(f"a = {number}\n" * 200)
    bpe = ("data.tokenizer=moejax.data.subword:BPE", "data.tokenizer.vocab_size=270")
    run = lambda: smoke("bpe", *files_of(folder), *bpe)
    train(run(), name="run", until=2)
    kept = pathlib.Path(run().workdir, TOKENIZER, "tokenizer.json")
    before = kept.read_bytes()
    for path in folder.iterdir():
        path.write_text("quite another text\n" * 200)
    with pytest.raises(UserError, match="trained on other data"):
        train(run(), name="run")
    assert kept.read_bytes() == before


@pytest.mark.slow
def test_a_collapsing_router_warns_within_100_steps(smoke):
    experiment = smoke(
        "collapse",
        "steps=60",
        "log_every=5",
        "optimizer.schedule.warmup_steps=1",
        # A router that starts at zero ties, and ties go to the first k experts.
        "model.block.ffn.router.kernel_init=flax.linen.initializers:zeros",
        "model.block.ffn.balance.0.weight=0.0",
        "optimizer.schedule.peak=0.0",
    )
    train(experiment, name="collapse")
    warnings = [
        r for r in records(experiment) if r["kind"] == "event" and "warning" in r["values"].values()
    ]
    assert warnings
    assert warnings[0]["step"] <= 100
    assert "layer 0" in warnings[0]["values"]["text"]


def test_variables_come_back_without_the_optimizer(finished):
    experiment, _ = finished
    loaded = load_variables(experiment, experiment.workdir)
    assert loaded.step == experiment.steps
    leaves = {jax.tree_util.keystr(p): x for p, x in final_state(experiment, experiment.steps)}
    for path, value in jax.tree_util.tree_leaves_with_path(loaded.variables["params"]):
        np.testing.assert_array_equal(value, leaves[".params" + jax.tree_util.keystr(path)])


@pytest.mark.long
def test_a_mesh_that_loses_rows_is_refused_before_the_first_step(smoke, monkeypatch):
    """The canary runs only where rows are exchanged."""
    lossy = lambda rows, traffic, *, axis, num_rows: [
        jnp.zeros_like(r, shape=(num_rows, *r.shape[1:])) for r in rows
    ]
    monkeypatch.setitem(BACKENDS, "two_hop", lossy)
    experiment = smoke("lossy", "mesh.expert=2")
    exchanging = experiment.model.block.ffn.clone(transport=LeastLoaded())
    block = experiment.model.block.clone(ffn=exchanging)
    model = dataclasses.replace(experiment.model, block=block)
    with pytest.raises(UserError, match="two_hop.*transport.exchange='gather'"):
        train(dataclasses.replace(experiment, model=model), name="lossy")
    train(experiment, name="local", until=1)  # nothing is exchanged
