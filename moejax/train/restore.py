"""Brings back a run: its state for training, or its variables for everything else."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from moejax.data.tokenizer import Tokenizer, load
from moejax.errors import UserError
from moejax.experiment import Experiment
from moejax.models.transformer import Transformer, Variables
from moejax.optim.paths import named_leaves
from moejax.train.checkpoint import Checkpointer
from moejax.train.state import TrainState

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


def restore_or_init(
    checkpointer: Checkpointer, fresh: Callable[[], TrainState], data_fingerprint: str
) -> tuple[TrainState, int]:
    """(state, the step it starts from): the newest valid checkpoint, else a fresh state.

    Raises UserError where the data are not those that the checkpoint was trained on.
    """
    if not checkpointer.steps():
        return jax.jit(fresh)(), 0
    restored = checkpointer.restore(with_sharding(jax.eval_shape(fresh)))
    saved = restored.extra.get("data_fingerprint")
    if saved != data_fingerprint:
        raise UserError(
            f"the checkpoint of step {restored.step} was trained on other data (fingerprint "
            f"{saved}, now {data_fingerprint}): restore the data, or use another workdir"
        )
    return restored.state, restored.step


def with_sharding(tree: Any) -> Any:
    """Abstract leaves with the sharding to restore to."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model ready to use."""

    experiment: Experiment
    model: Transformer
    variables: Variables
    tokenizer: Tokenizer
    step: int


def load_variables(
    experiment: Experiment, workdir: str | pathlib.Path, *, step: int | None = None
) -> LoadedRun:
    """Parameters and router state of a run's checkpoint; the optimiser's moments are not read."""
    workdir = pathlib.Path(workdir)
    tokenizer = load(workdir / TOKENIZER)
    model = experiment.build_model(tokenizer.vocab_size)
    shapes = {"router_state": {}} | jax.eval_shape(model.init, jax.random.key(0))
    wanted = named_leaves(with_sharding(shapes))
    with Checkpointer(str(workdir / CHECKPOINTS)) as checkpointer:
        restored = checkpointer.restore_leaves(wanted, step)
    leaves = [restored.state[path] for path in wanted]
    return LoadedRun(
        experiment=experiment,
        model=model,
        variables=jax.tree.unflatten(jax.tree.structure(shapes), leaves),
        tokenizer=tokenizer,
        step=restored.step,
    )
