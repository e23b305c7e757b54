"""Every config's smoke run trains: three steps as training assembles them, and a run that resumes.

The configs of tiny.py and router_tuning.py train as a whole in tests/train.
"""

import jax
import numpy as np
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.models.variables import parameters
from moejax.train import layout
from moejax.train.assemble import assemble
from moejax.train.loop import train
from moejax.train.restore import load_variables
from moejax.types import named_leaves
from tests.configs.test_every_config import CONFIGS, ROOT

OWN = ("configs/tiny.py", "configs/router_tuning.py")
SMOKES = [spec for spec in CONFIGS if ":smoke" in spec and not spec.startswith(OWN)]
MIXTURES = ("smoke", "smoke_comol", "smoke_dynmole", "smoke_mixlora", "smoke_remix")
# Compiling a step takes a processor ten seconds. This one has most that tiny.py has not.
OFTEN = "configs/deepseek_v3.py:smoke"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def build(monkeypatch, cache):
    monkeypatch.chdir(ROOT)

    def built(spec, workdir):
        overrides = [f"workdir={workdir}", f"data.cache_dir={cache}"]
        return build_config(apply_overrides(load_config(spec), overrides))

    return built


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [pytest.param(s, marks=() if s == OFTEN else pytest.mark.long) for s in SMOKES]
)
def test_three_steps(spec, build, tmp_path):
    experiment = build(spec, tmp_path / "run")
    data = experiment.prepare_data()
    mesh = experiment.mesh.build()
    with jax.set_mesh(mesh):
        model = experiment.build_model(data.tokenizer.vocab_size)
        shapes = parameters(jax.eval_shape(model.init, jax.random.key(0)))
        optimizer = experiment.build_optimizer(shapes)
        token_bytes = data.tokenizer.token_bytes()
        parts = assemble(experiment, model, optimizer, mesh, token_bytes=token_bytes)
        state = parts.initial_state()
        before = {path: np.asarray(x) for path, x in named_leaves(state.params).items()}
        losses = []
        for step in range(experiment.steps):
            batch = layout.global_batch(data.train.batch(step), mesh)
            state, metrics = parts.train_step(state, batch)
            losses.append(float(metrics["loss"]))
    # Next to uniform over the bytes: a start that is far from it is wrongly scaled.
    np.testing.assert_allclose(losses, np.log(data.tokenizer.vocab_size), rtol=0.05)
    still = [p for p, x in named_leaves(state.params).items() if np.array_equal(x, before[p])]
    assert still == []


@pytest.mark.long
@pytest.mark.parametrize("spec", SMOKES)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(spec, build, tmp_path):
    whole, parts = build(spec, tmp_path / "whole"), build(spec, tmp_path / "parts")
    train(whole, name="whole")
    train(parts, name="parts", until=2)
    train(parts, name="parts")
    left, right = (
        named_leaves(load_variables(e, e.workdir, step=3).variables) for e in (whole, parts)
    )
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=path)


def test_each_published_model_has_one_and_so_have_adapters_and_long_context():
    names = ("deepseek_v3", "gpt_oss_20b", "long_context_moba", "lora")
    names += ("mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b")
    own = {f"configs/{name}.py:smoke" for name in names}
    assert own | {f"configs/mixture_of_lora.py:{name}" for name in MIXTURES} == set(SMOKES)
