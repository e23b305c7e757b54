"""Runs in which most parameters are frozen: what is stored, what moves, and what must not."""

import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from moejax.balance.load_balance import LaggedLoadBalance
from moejax.balance.loss_free import LossFreeBias
from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError
from moejax.train import frozen
from moejax.train.assemble import assemble
from moejax.train.checkpoint import Checkpointer
from moejax.train.init_from import CHECKPOINTS
from moejax.train.layout import with_sharding
from moejax.train.loop import train
from moejax.train.restore import load_variables
from moejax.train.state import init_state
from moejax.train.step import _frozen_routers
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.train.step_cases import GUARD, make_batch, make_step, model_with

STEPS = ("steps=6", "log_every=2", "optimizer.schedule.warmup_steps=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def build(workdir, cache, *overrides, config="configs/router_tuning.py:smoke"):
    fixed = [f"workdir={workdir}", f"data.cache_dir={cache}", "data.train.pattern=p*/METADATA"]
    return build_config(apply_overrides(load_config(config), [*fixed, *overrides]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache):
    experiment = build(tmp_path_factory.mktemp("finished") / "run", cache, *STEPS)
    train(experiment, name="run")
    return experiment


def variables(experiment, step=None):
    return named_leaves(load_variables(experiment, experiment.workdir, step=step).variables)


def assembled(experiment):
    """(what a run executes, its mesh)."""
    mesh = experiment.mesh.build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = experiment.build_model(264)
        shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
        optimizer = experiment.build_optimizer(shapes)
        token_bytes = jax.numpy.ones(264, jax.numpy.int32)
        return assemble(experiment, model, optimizer, mesh, token_bytes=token_bytes), mesh


def initial(experiment):
    """The state that a run starts from, made by the same program, to the bit."""
    parts, mesh = assembled(experiment)
    with jax.set_mesh(mesh):
        return parts.initial_state()


def test_only_the_routers_move(finished):
    before = named_leaves(initial(finished).variables)
    after = variables(finished)
    moved = [path for path in before if not np.array_equal(before[path], after[path])]
    assert moved == ["params/layers_0/ffn/router/kernel"]


def two_stacks(trainable):
    """(a step of a model of two stacks of one layer each, its state)."""
    rules = (LossFreeBias(rate=0.01), LaggedLoadBalance(weight=0.1))
    model, optimizer = model_with(rules, num_layers=2, boundaries=(1,)), optax.sgd(0.1)
    state = init_state(model, optimizer, GUARD, 0, trainable=trainable)
    return make_step(model, optimizer), state


@pytest.mark.parametrize(
    ("trainable", "stay"),
    [
        ("*", set()),
        ("*/router/*", set()),
        ("layers_1/*/router/*", {"layers_0"}),
        ("*/experts/*", {"layers_0", "layers_1"}),
    ],
)
def test_the_state_of_a_router_is_frozen_with_it(trainable, stay):
    assert _frozen_routers(two_stacks((trainable,))[1]) == stay


def test_what_selects_stays_with_its_router_and_statistics_go_on():
    """A bias that moves on would choose other experts than the router that was frozen."""
    step, state = two_stacks(("layers_1/*/router/*",))
    before = named_leaves(state.router_state)
    after = named_leaves(quick_jit(step)(state, make_batch())[0].router_state)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {
        "layers_0/ffn/balance_1_previous_share",
        "layers_1/ffn/balance_0_correction_bias",
        "layers_1/ffn/balance_1_previous_share",
    }


def test_there_is_no_state_of_the_optimizer_for_what_is_frozen(finished):
    with Checkpointer(f"{finished.workdir}/{CHECKPOINTS}") as store:
        paths = store.manifest(6).leaves
    moments = {p for p in paths if "/mu/" in p or "/nu/" in p}
    assert {p.split("mu/")[-1].split("nu/")[-1] for p in moments} == {"layers_0/ffn/router/kernel"}
    assert [p for p in paths if p.startswith("params/")] == ["params/layers_0/ffn/router/kernel"]
    kept = frozen.stored(pathlib.Path(finished.workdir))
    assert "params/layers_0/ffn/experts/gate" in kept
    assert "params/layers_0/ffn/router/kernel" not in kept


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(finished, tmp_path, cache):
    parts = build(tmp_path / "parts", cache, *STEPS)
    assert train(parts, name="parts", until=3).step == 3
    assert train(parts, name="parts").step == 6
    whole, resumed = variables(finished), variables(parts)
    assert list(whole) == list(resumed)
    for path, value in whole.items():
        np.testing.assert_array_equal(value, resumed[path], err_msg=path)


def test_the_report_counts_what_trains(finished):
    lines = pathlib.Path(finished.workdir, "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    run = next(record["values"] for record in records if record["kind"] == "run")
    assert run["trainable"].startswith("256 of ")  # 2 layers, 32 x 4
    assert "'*/router/*': 1 leaves" in run["trainable"]


def test_a_frozen_parameter_that_changed_is_an_error(finished):
    kept = initial(finished).frozen
    workdir = pathlib.Path(finished.workdir)
    assert frozen.check_unchanged(workdir, kept) == len(named_leaves(kept))
    kept["head"]["kernel"] = kept["head"]["kernel"].at[0, 0].add(1e-7)
    with pytest.raises(UserError, match="params/head/kernel is no longer what it was"):
        frozen.check_unchanged(workdir, kept)


@pytest.mark.slow
def test_a_damaged_frozen_parameter_is_noticed_on_resume(tmp_path, cache):
    experiment = build(tmp_path / "run", cache, *STEPS)
    train(experiment, name="run", until=2)
    data = max((tmp_path / "run" / "frozen").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match="frozen"):
        train(experiment, name="run")


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, cache):
    experiment = build(tmp_path / "run", cache, *STEPS)
    frozen.save(tmp_path / "run", {"another": jax.numpy.zeros(3)})
    assert train(experiment, name="run", until=2).step == 2
    assert "params/head/kernel" in frozen.stored(tmp_path / "run")


@pytest.mark.slow
def test_lost_frozen_parameters_are_an_error(tmp_path, cache):
    experiment = build(tmp_path / "run", cache, *STEPS)
    train(experiment, name="run", until=2)
    (tmp_path / "run" / "frozen" / "step_00000000" / "manifest" / "manifest.json").unlink()
    with pytest.raises(UserError, match="frozen parameters in .* cannot be read"):
        train(experiment, name="run")


def test_a_pattern_that_matches_nothing_is_found_before_data_are_read(tmp_path, cache):
    experiment = build(tmp_path / "run", cache, 'trainable=["*/rooter/*"]')
    with pytest.raises(UserError, match=r"trainable: the pattern '\*/rooter/\*' matches none"):
        experiment.check()


def compiled_step(experiment):
    """The memory of one compiled step."""
    parts, mesh = assembled(experiment)
    with jax.set_mesh(mesh):
        state = with_sharding(jax.eval_shape(parts.fresh), parts.shardings)
        batch = experiment.abstract_batch(experiment.batch_size)
        return parts.train_step.lower(state, batch).compile().memory_analysis()


@pytest.mark.slow
def test_the_last_layers_alone_take_less_memory_than_all(tmp_path, cache):
    """Neither activations nor gradients of the layers below are kept."""
    layers = ("model.num_layers=6", "model.boundaries=[5]", "sequence_length=256")
    last = build(tmp_path / "a", cache, *layers, 'trainable=["layers_5/*"]')
    whole = build(tmp_path / "b", cache, *layers, 'trainable=["*"]')
    few, all_of_them = compiled_step(last), compiled_step(whole)
    assert few.temp_size_in_bytes < 0.6 * all_of_them.temp_size_in_bytes
    assert few.argument_size_in_bytes < 0.7 * all_of_them.argument_size_in_bytes
