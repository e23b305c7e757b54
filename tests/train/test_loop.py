"""The loop as a whole: resume, pauses, refused steps, roll-back, foreign data, warnings."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError
from moejax.objectives.lm import NextToken
from moejax.parallel.exchange import BACKENDS
from moejax.train.checkpoint import Checkpointer
from moejax.train.layout import one_device
from moejax.train.loop import train
from moejax.train.restore import CHECKPOINTS, load_variables
from moejax.train.state import init_state
from moejax.transport.least_loaded import LeastLoaded


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def build(workdir, cache, *overrides):
    fixed = [f"workdir={workdir}", f"data.cache_dir={cache}"]
    config = apply_overrides(load_config("configs/tiny.py:smoke"), [*fixed, *overrides])
    return build_config(config)


@pytest.fixture
def smoke(tmp_path, cache):
    """Builds the smoke experiment with overrides, in a folder of its own; it samples nothing."""

    def without_samples(name, *overrides):
        return dataclasses.replace(build(tmp_path / name, cache, *overrides), prompts=())

    return without_samples


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


def records(experiment):
    with open(f"{experiment.workdir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def assert_bit_equal(left, right):
    for (path, a), (_, b) in zip(left, right, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


UNUSED = 263  # the smallest vocabulary's last ids are of no text
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotFiniteAt(NextToken):
    """Next-token prediction whose loss is NaN from step `first` up to step `last`."""

    first: int
    last: int

    def __call__(self, model, variables, batch, *, step=0, **kwargs):
        result = super().__call__(model, variables, batch, step=step, **kwargs)
        bad = (step >= self.first) & (step <= self.last) & jnp.asarray("key" in kwargs)
        total, count = result.terms["lm"]
        terms = result.terms | {"lm": (total + jnp.where(bad, jnp.nan, 0.0), count)}
        return dataclasses.replace(result, terms=terms)


@pytest.mark.slow
def test_a_refused_step_changes_nothing_but_the_position(smoke):
    experiment = smoke("nan", "steps=3", "log_every=1")
    experiment = dataclasses.replace(experiment, objective=NotFiniteAt(first=1, last=1))
    train(experiment, name="nan")
    values = [r["values"] for r in records(experiment) if r["kind"] == "train"]
    assert [v["skipped"] for v in values] == [0, 1, 1]
    assert values[1]["loss"] == "nan"
    assert isinstance(values[2]["loss"], float)


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
def test_too_many_refusals_roll_back_and_data_go_on(smoke):
    experiment = smoke(
        "rollback",
        *("steps=9", "log_every=1", "checkpoint_every=2", "guard.max_consecutive_skips=1"),
        "keep_last=5",
    )
    experiment = dataclasses.replace(experiment, objective=NotFiniteAt(first=4, last=5))
    assert train(experiment, name="rollback").step == 9
    events = [r["values"] for r in records(experiment) if r["kind"] == "event"]
    texts = [e["text"] for e in events if e.get("event") == "rollback"]
    assert texts == ["rolled back to the parameters of step 4; data go on at 6"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoisonAt(NextToken):
    """Next-token prediction whose step `at` ruins the parameters: their loss is NaN from then on.

    It moves the embedding of a token that is not in use, and is an ordinary step otherwise.
    """

    at: int

    def __call__(self, model, variables, batch, *, step=0, **kwargs):
        result = super().__call__(model, variables, batch, step=step, **kwargs)
        row = variables["params"]["embed"]["embedding"][UNUSED]
        fresh = model.init(jax.random.split(jax.random.key(0))[0])["params"]["embed"]["embedding"]
        ruined = jnp.abs(jax.lax.stop_gradient(row) - fresh[UNUSED]).max() > 1e-3
        bad = ruined & jnp.asarray("key" in kwargs)
        total, count = result.terms["lm"]
        total = total + jnp.where(step == self.at, row.sum(), 0) + jnp.where(bad, jnp.nan, 0)
        return dataclasses.replace(result, terms=result.terms | {"lm": (total, count)})


@pytest.mark.slow
def test_a_step_on_its_way_at_a_roll_back_does_not_ask_for_another(smoke):
    """Of what was refused last, the figures come when the next step is already computed."""
    experiment = smoke(
        "in-flight",
        *("steps=14", "log_every=1", "checkpoint_every=4", "guard.max_consecutive_skips=1"),
        "keep_last=5",
    )
    experiment = dataclasses.replace(experiment, objective=PoisonAt(at=4))
    assert train(experiment, name="in-flight").step == 14
    found = records(experiment)
    (text,) = [r["values"]["text"] for r in found if r["values"].get("event") == "rollback"]
    assert text == "rolled back to the parameters of step 4; data go on at 8"
    values = [r["values"] for r in found if r["kind"] == "train"]
    assert [v["skipped"] for v in values] == [0] * 5 + [1, 2, 3] + [3] * 6
    schedule = experiment.optimizer.schedule.build(experiment.steps)
    # Updates 0 to 3 are in the checkpoint; that of step 4 was lost, and is made from batch 8.
    updates = [0, 1, 2, 3, 4, 4, 4, 4, *range(4, 10)]
    np.testing.assert_allclose([v["learning_rate"] for v in values], schedule(np.array(updates)))


def _refused_at_5_and_6(smoke, name):
    overrides = ("steps=9", "checkpoint_every=2", "guard.max_consecutive_skips=1", "keep_last=5")
    experiment = smoke(name, *overrides)
    return dataclasses.replace(experiment, objective=NotFiniteAt(first=4, last=5))


def _damage_before_restoring(monkeypatch, *steps):
    restore = Checkpointer.restore

    def damaged(self, *args, **kwargs):
        for step in steps:
            (self.directory.path(step) / "manifest" / "manifest.json").write_text("{")
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "restore", damaged)


@pytest.mark.slow
def test_a_roll_back_passes_over_a_corrupt_checkpoint_and_names_it(smoke, monkeypatch):
    experiment = _refused_at_5_and_6(smoke, "damaged")
    _damage_before_restoring(monkeypatch, 4)
    assert train(experiment, name="damaged").step == 9
    (text,) = [
        r["values"]["text"] for r in records(experiment) if r["values"].get("event") == "rollback"
    ]
    assert text == (
        "rolled back to the parameters of step 2; data go on at 6; "
        "corrupt and not used: step 4: its manifest is not readable"
    )


@pytest.mark.slow
def test_a_roll_back_without_a_sound_checkpoint_is_an_error(smoke, monkeypatch):
    experiment = _refused_at_5_and_6(smoke, "all-damaged")
    _damage_before_restoring(monkeypatch, 2, 4)
    with pytest.raises(UserError, match="steps up to step 6 were refused.*step 4: .*step 2: "):
        train(experiment, name="all-damaged")


@pytest.mark.slow
def test_refusals_without_end_are_an_error_that_names_the_way_out(smoke):
    experiment = smoke("hopeless", "steps=9", "guard.max_consecutive_skips=1")
    experiment = dataclasses.replace(experiment, objective=NotFiniteAt(first=0, last=99))
    with pytest.raises(UserError, match=r"2 steps up to step 2 were refused.*schedule.peak"):
        train(experiment, name="hopeless")


@pytest.mark.slow
def test_other_data_than_the_checkpoints_are_refused(smoke):
    train(smoke("data"), name="run", until=2)
    with pytest.raises(UserError, match="trained on other data"):
        train(smoke("data", "seed=5"), name="run")


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
