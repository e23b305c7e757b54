"""No shipped config's step computes every expert for every row, on any platform.

The whole training step is lowered for CPU, CUDA and TPU, and the program is searched for an array
of experts x rows x width, and for XLA's ragged dot where it becomes one.
"""

import itertools
import pathlib
import re

import fiddle as fdl
import jax
import jax.numpy as jnp
import pytest

from moejax.config.build import build_config
from moejax.config.load import config_functions, load_config
from moejax.config.symbols import import_file
from moejax.kernels import accepted
from moejax.kernels.grouped_matmul.implementations import Choice
from moejax.models.variables import parameters
from moejax.train.state import init_state
from moejax.train.step import jit_step, make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIGS = [
    f"configs/{path.name}:{name}"
    for path in sorted((ROOT / "configs").glob("*.py"))
    for name in config_functions(import_file(str(path)))
    # One without a model is tried with its smoke model.
    if "model" in fdl.ordered_arguments(load_config(f"{path}:{name}"))
]
# Every config on every platform takes minutes. Of the published models, one whose experts have what
# tiny.py's have not (biases, another activation) is tried often.
OFTEN = [spec for spec in CONFIGS if spec.startswith(("configs/tiny.py", "configs/router_tuning"))]


def _case(spec, platform):
    often = spec in OFTEN or (spec, platform) == ("configs/gpt_oss_20b.py:config", "cuda")
    return pytest.param(spec, platform, marks=() if often else pytest.mark.long)


VOCABULARY = 1000
# JAX's name for the platform, ours, and a kind of device that it has.
PLATFORMS = {
    "cpu": ("cpu", "cpu"),
    "cuda": ("gpu", "NVIDIA H100 80GB HBM3"),
    "tpu": ("tpu", "TPU v5"),
}


def lowered_step(config, platform: str) -> str:
    """The program of one training step, as it would run on `platform`."""
    experiment = build_config(config)
    ours, kind = PLATFORMS[platform]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=ours)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        model = experiment.build_model(VOCABULARY)
        params = parameters(jax.eval_shape(model.init, jax.random.key(0)))
        optimizer = experiment.build_optimizer(params)
        step = make_train_step(
            model,
            experiment.objective,
            optimizer,
            experiment.guard,
            num_microbatches=experiment.num_microbatches,
            token_bytes=jnp.ones(VOCABULARY, jnp.int32),
        )
        trainable = experiment.trainable
        state = jax.eval_shape(
            lambda: init_state(model, optimizer, experiment.guard, 0, trainable=trainable)
        )
        batch = experiment.abstract_batch(experiment.batch_size)
        traced = jit_step(step).trace(state, batch)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def sizes(config) -> tuple[set[int], set[int], int]:
    """(numbers of rows, widths, experts) of the MoE layers, in one microbatch."""
    moe = config.model.block.ffn
    experiment = build_config(config)
    tokens = config.batch_size * config.sequence_length // experiment.num_microbatches
    tokens *= getattr(experiment.objective, "num_draws", 1)  # forward passes side by side
    return (
        {tokens, tokens * moe.router.k},
        {config.model.d_model, moe.experts.d_ff},
        moe.num_experts,
    )


def dense_operations(program: str, config, platform: str) -> list[str]:
    """The operations that hold experts x rows x width, however the three are merged."""
    rows, widths, experts = sizes(config)
    top_k = config.model.block.ffn.router.k
    spellings = set()
    for n, width, twice in itertools.product(rows, widths, (1, 2)):
        w = twice * width
        for split in ((experts, n, w), (experts * n, w), (experts * w, n), (experts, n * w)):
            spellings.add(tuple(sorted(split)))
        spellings.add(tuple(sorted((experts, n // top_k, top_k, w))))
    # Stacked weights of that many layers, or of one, may happen to have such a shape.
    model = build_config(config).build_model(VOCABULARY)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    for leaf in jax.tree.leaves(variables):
        spellings -= {tuple(sorted(leaf.shape)), tuple(sorted(leaf.shape[1:]))}
    # So may tokens in the rank space of a mixture's A adapters `[A, in, rank]`.
    for leaf in jax.tree.leaves(variables.get("lora", {})):
        if leaf.ndim > 2:
            ranks = leaf.shape[-3] * leaf.shape[-1]
            spellings -= {tuple(sorted((n, ranks))) for n in rows}
    found = []
    for line in program.splitlines():
        operation = re.search(r'^\s*%\S+ = "?([a-z]\w*\.\w+)', line)
        if operation is None:
            continue
        if platform != "tpu" and "ragged_dot" in operation.group(1):
            found.append(f"{operation.group(1)}, which is dense on {platform}")
        for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", line):
            shape = [int(d) for d in dims.split("x")[:-1] if d != "1"]
            if tuple(sorted(shape)) in spellings:
                found.append(f"{operation.group(1)} of {shape}")
    return found


@pytest.fixture(autouse=True)
def at_root(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MOEJAX_KERNELS", str(tmp_path / "kernels.json"))


@pytest.mark.slow
@pytest.mark.parametrize("spec, platform", [_case(s, p) for s in CONFIGS for p in PLATFORMS])
def test_step_is_never_dense(spec, platform):
    config = load_config(spec)
    assert not dense_operations(lowered_step(config, platform), config, platform)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=() if s in OFTEN else pytest.mark.long) for s in CONFIGS],
)
def test_step_on_tpu_kernels_is_never_dense(spec):
    """What a user gets who accepted them."""
    config = load_config(spec)
    dtype = build_config(config).model.dtype  # kernels are accepted for a dtype of operands
    choice = {dtype: dict.fromkeys(Choice._fields, "tpu")}
    accepted.store("TPU v5", {"grouped_matmul": choice}, {})
    program = lowered_step(config, "tpu")
    assert "tpu_custom_call" in program
    assert "ragged_dot" not in program
    assert not dense_operations(program, config, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_guard_finds_a_dense_step(platform):
    config = load_config("configs/tiny.py:smoke")
    config.model.block.ffn.experts.implementation = "xla"
    assert dense_operations(lowered_step(config, platform), config, platform)


def test_the_guard_finds_every_expert_on_every_token():
    config = load_config("configs/tiny.py:smoke")
    (few, _), widths, experts = (sorted(s) if isinstance(s, set) else s for s in sizes(config))
    dense = jax.jit(lambda x, w: jnp.einsum("td,edf->etf", x, w))
    x, w = jnp.ones((few, 8)), jnp.ones((experts, 8, widths[0]))
    found = dense_operations(dense.lower(x, w).as_text(), config, "cpu")
    assert found
    assert all(re.fullmatch(r"stablehlo\.\w+ of \[.*\]", operation) for operation in found)


def test_every_config_has_experts():
    """Else the search above would know no sizes."""
    for spec in CONFIGS:
        assert all(isinstance(n, int) for group in sizes(load_config(spec))[:2] for n in group)
        assert isinstance(load_config(spec).model.block.ffn, fdl.Config)
