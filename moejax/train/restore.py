"""Brings back a run: its state for training, or its variables for everything else."""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from moejax.data.tokenizer import Tokenizer, load
from moejax.errors import UserError
from moejax.experiment import Experiment
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.parallel.mesh import Mesh
from moejax.train import processes
from moejax.train.assemble import Assembled
from moejax.train.checkpoint import Checkpointer
from moejax.train.layout import with_sharding
from moejax.train.state import TrainState
from moejax.types import named_leaves

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


def restore_or_init(
    checkpointer: Checkpointer, assembled: Assembled, data_fingerprint: str
) -> tuple[TrainState, int]:
    """(state, the step it starts from): the newest valid checkpoint, else a fresh state.

    Either is laid out as `assembled` says, however it was when it was saved. Raises UserError where
    the data are not those that the checkpoint was trained on.
    """
    if not processes.from_first(checkpointer.steps()):
        return assembled.initial_state(), 0
    shapes = jax.eval_shape(assembled.fresh)
    restored = checkpointer.restore(with_sharding(shapes, assembled.shardings))
    saved = restored.extra.get("data_fingerprint")
    if saved != data_fingerprint:
        raise UserError(
            f"the checkpoint of step {restored.step} was trained on other data (fingerprint "
            f"{saved}, now {data_fingerprint}): restore the data, or use another workdir"
        )
    return restored.state, restored.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model ready to use; `mesh` is where its variables lie."""

    experiment: Experiment
    model: Transformer
    variables: Variables
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    step: int


def load_variables(
    experiment: Experiment, workdir: str | pathlib.Path, *, step: int | None = None
) -> LoadedRun:
    """Parameters and router state of a run's checkpoint; the optimiser's moments are not read.

    They lie on one device, or in a run of several processes on the experiment's mesh.
    """
    workdir = pathlib.Path(workdir)
    tokenizer = load(workdir / TOKENIZER)
    model = experiment.build_model(tokenizer.vocab_size)
    shapes = {"router_state": {}} | jax.eval_shape(model.init, jax.random.key(0))
    mesh = (Mesh(data=1) if processes.num_processes() == 1 else experiment.mesh).build()
    shardings = {"router_state": {}} | experiment.variable_shardings(model, mesh)
    wanted = named_leaves(with_sharding(shapes, shardings))
    with Checkpointer(str(workdir / CHECKPOINTS)) as checkpointer:
        restored = checkpointer.restore_leaves(wanted, step)
    leaves = [restored.state[path] for path in wanted]
    return LoadedRun(
        experiment=experiment,
        model=model,
        variables=jax.tree.unflatten(jax.tree.structure(shapes), leaves),
        mesh=mesh,
        tokenizer=tokenizer,
        step=restored.step,
    )
