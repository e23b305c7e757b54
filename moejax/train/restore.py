"""Brings back a run: its state for training, or its variables for everything else."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from moejax.data.pipeline import Loaders
from moejax.data.tokenizer import Tokenizer, load
from moejax.errors import UserError
from moejax.experiment import Experiment
from moejax.interop import hf
from moejax.models.output import Variables
from moejax.models.transformer import Transformer
from moejax.parallel.mesh import Mesh
from moejax.train import frozen, phases, processes
from moejax.train.assemble import Assembled
from moejax.train.checkpoint import Checkpointer
from moejax.train.init_from import (
    CHECKPOINTS,
    COLLECTIONS,
    HF,
    in_checkpoints,
    newest,
    read_weights,
    readable,
)
from moejax.train.layout import with_sharding
from moejax.train.slices import StoredSlices
from moejax.train.state import TrainState, changing, variables_of, with_leaves
from moejax.types import named_leaves

TOKENIZER = "tokenizer"
_TRAINED_ON, _HELD_OUT = "data_fingerprint", "held_out_fingerprint"  # in a checkpoint's extra


@phases.phase("restore")
def restore_or_init(
    experiment: Experiment,
    model: Transformer,
    assembled: Assembled,
    checkpointer: Checkpointer,
    data: Loaders,
) -> tuple[TrainState, int]:
    """(state, the step it starts from): the newest valid checkpoint, else a fresh state.

    Either is laid out as `assembled` says, however it was when it was saved. Raises UserError where
    `data` are not those of the checkpoint.
    """
    workdir = pathlib.Path(experiment.workdir)
    if not processes.from_first(checkpointer.steps()):
        state = assembled.initial_state(_given(experiment, model, assembled))
        frozen.save(workdir, state.frozen)
        return state, 0
    wanted = with_sharding(jax.eval_shape(assembled.fresh), assembled.shardings)
    restored = checkpointer.restore(changing(wanted))
    what = {_TRAINED_ON: "trained on other", _HELD_OUT: "evaluated on other held-out"}
    for name, now in fingerprints_of(data).items():
        saved = restored.extra.get(name, now if name == _HELD_OUT else None)
        if saved != now:
            raise UserError(
                f"the checkpoint of step {restored.step} was {what[name]} data (fingerprint "
                f"{saved}, now {now}): restore the data, or use another workdir"
            )
    kept = frozen.restore(workdir, named_leaves({"params": wanted.frozen}))
    kept = {path.replace("params", "frozen", 1): leaf for path, leaf in kept.items()}
    return with_leaves(wanted, restored.state | kept), restored.step


def fingerprints_of(data: Loaders) -> dict[str, str]:
    """What a checkpoint says of its data."""
    return {_TRAINED_ON: data.fingerprint, _HELD_OUT: data.held_out_fingerprint}


def same_held_out(extra: Mapping[str, Any], data: Loaders) -> bool:
    """Whether the checkpoint that `extra` is of was evaluated on what `data` hold out.

    True for one that does not say.
    """
    return extra.get(_HELD_OUT, data.held_out_fingerprint) == data.held_out_fingerprint


def _given(experiment: Experiment, model: Transformer, assembled: Assembled) -> Variables | None:
    if experiment.init_from is None:
        return None
    source, workdir = pathlib.Path(experiment.init_from), pathlib.Path(experiment.workdir)
    given = read_weights(source, model, assembled.variables)
    carried = source if hf.is_checkpoint(source) else source / HF
    if carried.exists():
        processes.by_first(lambda: hf.carry(carried, workdir / HF))
    return given


def model_of(described: Experiment | Transformer, workdir: pathlib.Path) -> Transformer:
    """The model of a run (an `Experiment`) or of an imported checkpoint (a `Transformer`)."""
    if isinstance(described, Transformer):
        return described
    return described.build_model(load(workdir / TOKENIZER).vocab_size)


def open_slices(workdir: pathlib.Path, step: int | None) -> tuple[int, list[StoredSlices]]:
    """(step, the variables of a checkpoint and what its run froze, not yet read).

    Of the newest checkpoint where `step` is None. Raises UserError where there is none.
    """
    with Checkpointer(str(workdir / CHECKPOINTS)) as store:
        found = newest(store, workdir) if step is None else readable(store, step)
        directory = pathlib.Path(store.directory.path(found.step))
    trained = {p: leaf for p, leaf in found.leaves.items() if p.startswith(COLLECTIONS)}
    kept = frozen.stored(workdir)
    slices = [StoredSlices(directory, path, leaf) for path, leaf in trained.items()]
    folder = frozen.directory(workdir)
    return found.step, slices + [StoredSlices(folder, path, leaf) for path, leaf in kept.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model ready to use.

    `mesh` is where its variables lie, `extra` what was saved beside them.
    """

    experiment: Experiment
    model: Transformer
    variables: Variables
    mesh: jax.sharding.Mesh
    tokenizer: Tokenizer
    step: int
    extra: Mapping[str, Any]


def load_variables(
    experiment: Experiment,
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    mesh: Mesh | None = None,
) -> LoadedRun:
    """Parameters and router state of a run's checkpoint; the optimiser's moments are not read.

    They lie on `mesh`; by default on one device, or in a run of several processes on the
    experiment's mesh.
    """
    workdir = pathlib.Path(workdir)
    tokenizer = load(workdir / TOKENIZER)
    model = experiment.build_model(tokenizer.vocab_size)
    shapes = in_checkpoints(jax.eval_shape(model.init, jax.random.key(0)))
    alone = processes.num_processes() == 1
    mesh = (mesh or (Mesh(data=1) if alone else experiment.mesh)).build()
    shardings = in_checkpoints(experiment.variable_shardings(model, mesh))
    wanted = named_leaves(with_sharding(shapes, shardings))
    known = frozen.stored(workdir)
    trained = {path: like for path, like in wanted.items() if path not in known}
    with Checkpointer(str(workdir / CHECKPOINTS)) as checkpointer:
        restored = checkpointer.restore_leaves(trained, step)
    kept = frozen.restore(workdir, {path: wanted[path] for path in wanted if path in known})
    leaves = [(restored.state | kept)[path] for path in wanted]
    found = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return LoadedRun(
        experiment=experiment,
        model=model,
        variables=variables_of(found["params"], found["router_state"]),
        mesh=mesh,
        tokenizer=tokenizer,
        step=restored.step,
        extra=restored.extra,
    )
