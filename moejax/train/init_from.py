"""The weights that a run starts from, read into the layout in which it trains.

Three kinds of folder: a run of moejax, what `moejax import-hf` wrote (which looks like one), and a
Hugging Face checkpoint. Names and shapes must be the model's, one for one. How the source
stacked its layers may differ: layer l goes to layer l.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moejax.balance.rule import CORRECTION_BIAS
from moejax.errors import UserError
from moejax.interop import hf
from moejax.models.moe import without_place
from moejax.models.output import Variables
from moejax.models.stack import rows_elsewhere, stacked_layers
from moejax.models.transformer import Transformer
from moejax.models.variables import ADAPTERS, collections, parameters
from moejax.train import frozen, processes
from moejax.train.checkpoint import Checkpointer
from moejax.train.manifest import CorruptCheckpoint, Leaf, Manifest
from moejax.types import named_leaves, tree_of

CHECKPOINTS = "checkpoints"
HF = "hf"  # config.json and tokenizer files of the Hugging Face checkpoint that all began with
LAYERS = "layers"  # in a checkpoint's `extra`: {name of stacked parameters: their layers}

_log = logging.getLogger(__name__)

COLLECTIONS = ("params/", "router_state/")
_ADAPTERS, _STATE = f"params/{ADAPTERS}/", "router_state/"
Rows = list[tuple[str, int | None]]  # (path in the source, row of it or all), in order


def read_weights(path: pathlib.Path, model: Transformer, shardings: Variables) -> Variables:
    """The model's parameters, and adapters and `router_state` where the source has them.

    Args:
      path: a folder of any of the three kinds.
      model: to be trained; how it stacks layers is free.
      shardings: of its variables.

    Raises:
      UserError: the folder is of none of these kinds or is damaged, or a parameter is missing, is
        one too many or has another shape; or the model has no place for a correction bias.
    """
    read = hf.load_into if hf.is_checkpoint(path) else _from_run
    found = read(path, model, shardings)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(found["params"]))
    state = "router state too" if found.get("router_state") else "no router state"
    _log.info("starting from the weights of %s: %.1f MB, %s", path, num_bytes / 1e6, state)
    return found


def _from_run(path: pathlib.Path, model: Transformer, shardings: Variables) -> Variables:
    """The newest checkpoint of a run, and what the run froze."""
    placed = named_leaves(in_checkpoints(shardings))
    shapes = named_leaves(in_checkpoints(jax.eval_shape(model.init, jax.random.key(0))))
    with Checkpointer(str(path / CHECKPOINTS)) as store:
        found = newest(store, path)
        if LAYERS not in found.extra:
            raise UserError(f"{path} does not say which layers it holds: train it anew")
        plan = _plan(path, shapes, stacked_layers(model.segments), found.extra[LAYERS])
        trained = {p: leaf for p, leaf in found.leaves.items() if p.startswith(COLLECTIONS)}
        stored = trained | frozen.stored(path)
        plan = _without_missing(_by_meaning(path, plan, stored), stored)
        _check(path, plan, shapes, stored)
        wanted = {
            source: _abstract(stored[source], placed[name])
            for name, rows in plan.items()
            for source, _ in rows
        }
        changing = {p: x for p, x in wanted.items() if p in trained}
        arrays = store.restore_leaves(changing, found.step).state
    arrays |= frozen.restore(path, {p: x for p, x in wanted.items() if p not in trained})
    found = tree_of({name: _join(rows, arrays, placed[name]) for name, rows in plan.items()})
    return collections(found.pop("params")) | found


def in_checkpoints(variables: Variables) -> dict[str, Any]:
    """The tree of `variables` whose paths are those in a checkpoint."""
    state = variables.get("router_state", {})
    return {"params": parameters(variables), "router_state": state}


def newest(store: Checkpointer, path: pathlib.Path) -> Manifest:
    """The manifest of the newest checkpoint of the folder `path`.

    Raises UserError where there is none, or it is damaged.
    """
    steps = processes.from_first(store.steps())
    if not steps:
        raise UserError(
            f"{path} holds no weights: name a run of moejax that has a checkpoint, a folder that "
            "`moejax import-hf` wrote, or a Hugging Face checkpoint"
        )
    return readable(store, steps[-1])


def readable(store: Checkpointer, step: int) -> Manifest:
    """The manifest of one checkpoint; UserError where it is damaged or not there."""
    try:
        return store.manifest(step)
    except CorruptCheckpoint as error:
        where = store.directory.path(step)
        raise UserError(f"{where}: {error}; restore it from a copy") from error


def _plan(path: pathlib.Path, names, ours: Mapping, theirs: Mapping) -> dict[str, Rows]:
    """{path of a leaf: where the source has its rows}."""
    num_ours, num_theirs = (sum(map(len, layers.values())) for layers in (ours, theirs))
    if num_theirs != num_ours:
        raise UserError(f"{path} has {num_theirs} layers and model.num_layers is {num_ours}")
    where = rows_elsewhere(ours, theirs)
    plan: dict[str, Rows] = {}
    for name in names:
        words = name.split("/")
        at = next((i for i, word in enumerate(words) if word in ours), None)
        if at is None:
            plan[name] = [(name, None)]
            continue
        source = lambda own, words=words, at=at: "/".join([*words[:at], own, *words[at + 1 :]])
        plan[name] = [(source(own), row) for own, row in where[words[at]]]
    return plan


def _by_meaning(
    path: pathlib.Path, plan: dict[str, Rows], stored: Mapping[str, Leaf]
) -> dict[str, Rows]:
    """The plan with router state found by what it is, wherever its rule stands among the rules.

    Raises UserError where two rules of the source remember the same.
    """
    theirs: dict[str, str] = {}
    for source in stored:
        meaning = without_place(source)
        if source.startswith(_STATE) and theirs.setdefault(meaning, source) != source:
            raise UserError(f"{path} has both {theirs[meaning]} and {source}: which is meant?")
    found = lambda source: theirs.get(without_place(source), source)
    return {name: [(found(source), row) for source, row in rows] for name, rows in plan.items()}


def _without_missing(plan: dict[str, Rows], stored: Mapping[str, Leaf]) -> dict[str, Rows]:
    """The plan without what a source need not have: a rule's state, and adapters if it has none."""
    fresh = {
        name
        for name, rows in plan.items()
        if name.startswith(_STATE) and not any(source in stored for source, _ in rows)
    }
    if not any(path.startswith(_ADAPTERS) for path in stored):
        fresh |= {name for name in plan if name.startswith(_ADAPTERS)}
    return {name: rows for name, rows in plan.items() if name not in fresh}


def _check(path: pathlib.Path, plan: dict[str, Rows], shapes, stored: dict[str, Leaf]) -> None:
    """Raises UserError unless parameters, and router state if any, are the same, one for one."""
    needed = {}
    for name, rows in plan.items():
        for source, row in rows:
            shape = shapes[name].shape if row is None else shapes[name].shape[1:]
            needed[source] = (row is not None, shape)
    for source, (stacked, shape) in needed.items():
        if source not in stored:
            raise UserError(f"{path} lacks {source}, which the model has")
        found = stored[source].shape[1:] if stacked else stored[source].shape
        if found != shape:
            raise UserError(
                f"{source} has shape {list(found)} in {path}"
                f"{' for each layer' if stacked else ''} and {list(shape)} in the model"
            )
    for source in stored:
        if source in needed:
            continue
        if source.startswith("params/"):
            raise UserError(f"{path} has {source}, which the model lacks")
        if source.endswith(CORRECTION_BIAS):
            raise UserError(
                f"{path} has {source}, by which experts are chosen, and the model lacks it: add "
                "LossFreeBias to model.block.ffn.balance, with rate=0.0 if it shall stay"
            )


def _abstract(leaf: Leaf, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _join(rows: Rows, arrays: Mapping[str, jax.Array], sharding: NamedSharding) -> jax.Array:
    """One leaf of the model from rows of the source's."""
    first = arrays[rows[0][0]]
    if rows[0][1] is None or rows == [(rows[0][0], row) for row in range(first.shape[0])]:
        return first
    pick = lambda arrays: jnp.stack([arrays[source][row] for source, row in rows])
    needed = {source: arrays[source] for source, _ in rows}
    return jax.jit(pick, out_shardings=sharding)(needed)
