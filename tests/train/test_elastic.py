"""A run goes on, to the bit, on other devices than those that it was saved on."""

import json
import pathlib

import jax
import numpy as np
import pytest

from moejax.commands import main
from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.train import loop, restore
from moejax.train.assemble import assemble
from moejax.train.checkpoint import Checkpointer
from moejax.train.init_from import CHECKPOINTS
from moejax.train.state import changing

SMOKE = "configs/tiny.py:smoke"
SMALL = (
    *("model.num_layers=1", "model.d_model=16", "sequence_length=32", "batch_size=8"),
    *("prompts=()", "steps=6", "checkpoint_every=0", "keep_last=9"),
    "model.block.ffn.balance.0=moejax.balance.loss_free:LossFreeBias",
)
EIGHT = ("mesh.data=2", "mesh.fsdp=2", "mesh.expert=2")
ONE = ("mesh.data=1", "mesh.fsdp=1", "mesh.expert=1")
FOUR = ("mesh.data=1", "mesh.fsdp=1", "mesh.expert=4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def build(workdir, cache, *overrides):
    fixed = [f"workdir={workdir}", f"data.cache_dir={cache}"]
    return build_config(apply_overrides(load_config(SMOKE), [*fixed, *SMALL, *overrides]))


def restored(experiment):
    """(state, step) as the loop restores it, laid out over the experiment's mesh."""
    data = loop.prepare_data(experiment)
    model, mesh = experiment.build_model(data.tokenizer.vocab_size), experiment.mesh.build()
    with jax.set_mesh(mesh):
        optimizer = experiment.build_optimizer(
            jax.eval_shape(model.init, jax.random.key(0))["params"]
        )
        parts = assemble(experiment, model, optimizer, mesh, token_bytes=np.ones(264, np.int32))
        with Checkpointer(f"{experiment.workdir}/{CHECKPOINTS}") as store:
            state, step = restore.restore_or_init(experiment, model, parts, store, data)
            extra = store.manifest(step).extra
            store.save(step + 1, changing(state), extra)
    return state, step


def bits(state):
    data = lambda x: (
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return {path: np.asarray(data(x)).tobytes() for path, x in changing(state).items()}


def test_the_whole_state_comes_back_on_8_1_4_and_8_devices(tmp_path, cache):
    """Parameters, moments, keys, counters and the router's bias; each layout saves for the next."""
    loop.train(build(tmp_path / "run", cache, *EIGHT), name="run", until=3)
    found = []
    for number, mesh in enumerate((EIGHT, ONE, FOUR, EIGHT)):
        state, step = restored(build(tmp_path / "run", cache, *mesh))
        assert step == 3 + number
        assert int(state.step) == 3
        found.append(bits(state))
        devices = {len(x.sharding.device_set) for x in jax.tree.leaves(state.params)}
        assert devices == {{EIGHT: 8, ONE: 1, FOUR: 4}[mesh]}
        split = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
        assert bool(split) == (mesh != ONE)
    assert found[0] == found[1] == found[2] == found[3]
    (bias,) = (path for path in found[0] if "correction_bias" in path)
    assert any(found[0][bias])  # it has moved
    for part in ("params/", "opt_state/", "router_state/", "guard/", "key", "step"):
        assert any(path.startswith(part) for path in found[0]), part


def losses(workdir):
    lines = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["values"]["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.long
def test_the_command_resumes_on_another_mesh(tmp_path, cache, capsys, monkeypatch):
    """The mesh is not part of what a run is: the same losses, to rounding."""
    monkeypatch.setenv("MOEJAX_CACHE", str(cache))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", SMOKE, *SMALL, *ONE, f"workdir={whole}"]) == 0
    assert main(["train", SMOKE, *SMALL, *ONE, f"workdir={parts}", "--until", "3"]) == 0
    assert main(["train", str(parts), *FOUR]) == 0
    found, expected = losses(parts), losses(whole)
    assert sorted(found) == list(range(1, 7))
    assert [found[s] for s in (1, 2, 3)] == [expected[s] for s in (1, 2, 3)]
    np.testing.assert_allclose([found[s] for s in found], [expected[s] for s in found], atol=1e-5)
    capsys.readouterr()
    assert main(["train", str(parts), "seed=1"]) == 2
    assert "holds another experiment (seed: 0 -> 1)" in capsys.readouterr().err
