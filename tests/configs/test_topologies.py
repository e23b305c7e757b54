"""Configs named after machines: their sizes divide, and what they must hold fits.

Nothing here is compiled for those machines; `tests/planning/test_plan_contracts.py` does that, and
says which of them fit with their activations.
"""

import functools
import math

import jax
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.text import config_diff
from moejax.errors import UserError
from moejax.parallel.mesh import AXES
from moejax.parallel.sharding import parameter_shardings
from tests.configs.test_every_config import CONFIGS, ROOT

# {word in the function's name: bytes of memory of one device, devices per number in the name}.
# Google counts TensorCores, of which a v5p chip, one device of JAX, has two.
MACHINES = {"h100": (80e9, 1), "v5p": (95e9, 0.5)}
# Parameter, gradient and two moments, all float32: what a step cannot do without.
STATE_BYTES = 16


def machine(spec) -> tuple[float, int] | None:
    """(bytes per device, number of devices), or None for a config of no machine."""
    words = spec.partition(":")[2].split("_")
    for name, (num_bytes, devices) in MACHINES.items():
        if name in words:
            return num_bytes, int(int(words[words.index(name) + 1]) * devices)
    return None


TOPOLOGIES = [spec for spec in CONFIGS if machine(spec)]


@functools.cache
def shapes_and_axes(model):
    """Abstract parameters and the logical axes of each; machines share a model."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    return shapes, model.logical_axes()["params"]


def state_per_device(experiment, vocab_size, num_devices) -> float:
    """Bytes of parameters, gradients and moments on a device."""
    sizes = experiment.mesh.sizes(num_devices)
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=auto)
    shapes, axes = shapes_and_axes(experiment.build_model(vocab_size))
    most = experiment.mesh.max_replicated_bytes
    placed = parameter_shardings(mesh, shapes, axes, max_replicated=most)
    of = lambda leaf, where: math.prod(where.shard_shape(leaf.shape))
    return STATE_BYTES * sum(jax.tree.leaves(jax.tree.map(of, shapes, placed)))


@pytest.fixture(autouse=True)
def at_root(monkeypatch, unchecked):  # an abstract mesh stands for one of so many devices
    monkeypatch.chdir(ROOT)


def test_there_are_some():
    stems = {spec.partition(":")[0] for spec in TOPOLOGIES}
    assert len(stems) == 5
    assert len(TOPOLOGIES) == 12


@pytest.mark.parametrize("spec", TOPOLOGIES)
def test_everything_divides_and_the_state_takes_less_than_half_of_the_memory(spec):
    config, (num_bytes, num_devices) = load_config(spec), machine(spec)
    experiment = build_config(config)
    assert math.prod(experiment.mesh.sizes(num_devices).values()) == num_devices
    experiment.mesh.check_batch(
        num_devices,
        batch_size=experiment.batch_size // experiment.num_microbatches,
        sequence_length=experiment.sequence_length,
    )
    held = state_per_device(experiment, config.data.tokenizer.vocab_size, num_devices)
    assert 0 < held < num_bytes / 2


@pytest.mark.parametrize("spec", TOPOLOGIES)
def test_only_the_layout_differs_from_the_config_of_no_machine(spec):
    stem, _, name = spec.partition(":")
    plain = load_config(f"{stem}:large" if name.startswith("large") else stem)
    changed = {line.split(":")[0] for line in config_diff(plain, load_config(spec)).splitlines()}
    assert changed == {"mesh.fsdp", "mesh.expert", "num_microbatches"}


def test_a_mesh_that_does_not_divide_is_found():
    config = load_config("configs/gpt_oss_20b.py:h100_64")
    config.mesh.fsdp = 16  # 2880 / (16 * 8) is no whole number
    with pytest.raises(UserError, match="of size 2880 cannot be split 128 ways"):
        state_per_device(build_config(config), config.data.tokenizer.vocab_size, 128)


def test_a_state_that_does_not_fit_is_found():
    config = load_config("configs/deepseek_v3.py:h100_512")
    config.mesh.fsdp, config.mesh.expert = 8, 8
    experiment = build_config(config)
    assert state_per_device(experiment, config.data.tokenizer.vocab_size, 64) > 80e9
