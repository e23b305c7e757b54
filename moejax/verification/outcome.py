"""One training step of a variant, and everything about it that must not depend on the variant."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.experiment import Experiment
from moejax.models.output import Output
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.parallel.mesh import Mesh
from moejax.train import layout
from moejax.train.assemble import assemble
from moejax.train.state import TrainState, with_leaves
from moejax.types import Batch, named_leaves

Outcome = dict[str, np.ndarray]  # by name, in the order in which differences are to be reported

LEARNING_RATE = 0.1
STIRRED = 0.1  # deviation of what factors of adapters begin with here
SAME_STATISTICS = ("load", "tokens", "entropy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """What the routers of a step did, by segment.

    Attributes:
      choices: `{segment: [L, T, K]}`, an id of E for an empty slot.
      probs: `{segment: [L, T, E]}`.
    """

    choices: dict[str, np.ndarray]
    probs: dict[str, np.ndarray]


def outcome(
    experiment: Experiment, model: Transformer, batch: Batch, *, replay: Any = None
) -> tuple[Outcome, Routed]:
    """(what one step of SGD gives, what its routers did); `replay` is the choices of another.

    The step is the one that training takes, on the experiment's mesh and from its seed, but for
    factors of adapters that begin at zero (`stirred`). Under the names of the outcome are: the
    initial parameters, loss, terms, counts, every gradient, the global gradient norm, the updated
    parameters and the router's state.
    """
    recording = _recording(model, replay)
    mesh = experiment.mesh.build(_devices(experiment.mesh))
    with jax.set_mesh(mesh):
        assembled = assemble(
            experiment,
            recording,
            _recording_sgd(LEARNING_RATE),
            mesh,
            token_bytes=jnp.ones((model.vocab_size,), jnp.int32),
        )
        state = stirred(assembled.initial_state())
        initial = _on_host(parameters(state.variables))  # before the step takes its buffers
        state, metrics = assembled.train_step(state, layout.global_batch(batch, mesh))
        state, metrics = _on_host(state), jax.device_get(metrics)
    stats = metrics["stats"]
    traces = {name: own["trace"] for name, own in stats.items() if "trace" in own}
    of = lambda key: {name: trace[key] for name, trace in traces.items()}
    routed = Routed(choices=of("experts"), probs=of("probs"))
    found = {
        **_named("initial", initial),
        "loss": metrics["loss"],
        **_named("term", metrics["terms"]),
        **_named("measure", metrics["measures"]),
        **_named("statistics", _comparable(stats)),
        **_named("gradient", state.opt_state),
        "global_norm of all gradients": metrics["grad_norm"],
        **_named("updated", parameters(state.variables)),
        **_named("router_state", state.router_state),
    }
    return {name: np.asarray(value) for name, value in found.items()}, routed


def stirred(state: TrainState) -> TrainState:
    """The state with numbers in the place of adapters' zeros, the same in every layout.

    Fresh adapters add nothing, because one factor of each is zero: the other has no gradient then,
    nor has a router that weighs them, and whatever is wrong with theirs would go unseen.
    """
    leaves = named_leaves(state)
    fresh = {
        path: leaf
        for path, leaf in leaves.items()
        if path.startswith("params/lora/") and not jnp.any(leaf)
    }
    return with_leaves(state, {path: _random(path, leaf) for path, leaf in fresh.items()})


def _random(path: str, like: jax.Array) -> jax.Array:
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    values = rng.normal(0, STIRRED, like.shape).astype(like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda part: values[part])


def _devices(mesh: Mesh) -> list[jax.Device]:
    """All, or for a mesh of one device the process's own: then every process computes the same."""
    alone = math.prod(mesh.sizes(jax.device_count()).values()) == 1
    return jax.local_devices()[:1] if alone else jax.devices()


def _recording(model: Transformer, replay: Any) -> Transformer:
    """The model, of a class derived from its own, that records its choices or replays others'."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recording(type(model)):
        def apply(self, *args: Any, **options: Any) -> Output:
            selection = jax.tree.map(jnp.asarray, replay)
            return super().apply(*args, **options | {"selection": selection, "record": True})

    fields = (f.name for f in dataclasses.fields(model) if f.init)
    return Recording(**{name: getattr(model, name) for name in fields})


def _recording_sgd(learning_rate: float) -> optax.GradientTransformation:
    """Plain SGD whose state is the gradient that it was given."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params=None: (
            jax.tree.map(lambda g: -learning_rate * g, grads),
            jax.tree.map(lambda g, old: g.astype(old.dtype), grads, state),
        ),
    )


def _on_host(tree: Any) -> Any:
    """The values of global arrays, in every process."""
    mesh = jax.tree.leaves(tree)[0].sharding.mesh
    whole = jax.jit(lambda t: t, out_shardings=layout.replicated(mesh))
    return jax.device_get(whole(tree))


def _comparable(stats: Any) -> Any:
    """Statistics that no layout may change, and the choices dropped, of which there may be none."""
    kept = (*SAME_STATISTICS, "dropped")
    return {name: {k: own[k] for k in kept if k in own} for name, own in stats.items()}


def _named(group: str, tree: Any) -> dict[str, Any]:
    return {f"{group} {path}": leaf for path, leaf in named_leaves(tree).items()}
