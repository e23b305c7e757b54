"""Compares every variant of an experiment with one device: first in float64, then as configured."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.balance.unbalanced import Unbalanced
from moejax.errors import UserError
from moejax.experiment import Experiment
from moejax.models.expert_axes import expert_axes
from moejax.models.transformer import Transformer
from moejax.transport.local import Local
from moejax.types import Batch
from moejax.verification import flips
from moejax.verification.compare import Difference, compare
from moejax.verification.definition import by_definition
from moejax.verification.outcome import Outcome, Routed, outcome
from moejax.verification.variants import on_mesh, variants, with_ffn

_log = logging.getLogger(__name__)

VOCABULARY = 64
SEQUENCE_LENGTH = 16
EXACT = 1e-9  # in float64 nothing but the order of sums may differ
TOLERANCES = {"float64": EXACT, "float32": 1e-4, "bfloat16": 5e-2}  # the selection replayed
FLOORS = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 1e-2}  # see `compare`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A variant's result.

    Attributes:
      name: of the variant.
      dtype: it was computed in.
      tolerance: of the largest relative error.
      worst: the tensor with the largest error; None where the variant cannot be built.
      wrong: every tensor whose error is above the tolerance, in order.
      refused: why the variant cannot be built, or None.
      flipped: share of the choices that differ from the oracle's own, where they are replayed.
      margin: the largest of theirs, see `flips.margin`; None where all choices are the same.
    """

    name: str
    dtype: str
    tolerance: float
    worst: Difference | None
    wrong: Sequence[Difference] = ()
    refused: str | None = None
    flipped: float | None = None
    margin: float | None = None


def verify(
    experiment: Experiment, *, chosen: Callable[[str], bool] = lambda name: True
) -> Iterator[Checked]:
    """Every variant's comparison with one device, as it is made.

    Needs `jax_enable_x64`. Balance rules that say of themselves that they depend on the mesh are
    left out: see `without_mesh_dependent`.
    """
    if not jax.config.jax_enable_x64:
        raise ValueError("verify compares in float64: set jax_enable_x64 before anything else")
    model = without_mesh_dependent(experiment.build_model(VOCABULARY))
    for dtype in ("float64", model.dtype):
        cast = dataclasses.replace(
            model, dtype=dtype, param_dtype="float64" if dtype == "float64" else model.param_dtype
        )
        yield from _in_one_dtype(experiment, cast, chosen)
        if dtype == model.dtype == "float64":
            return


def without_mesh_dependent(model: Transformer) -> Transformer:
    """The model without the balance rules whose results depend on the mesh by their definition."""
    if model.moe is None:
        return model
    kept = tuple(rule for rule in model.moe.balance if not rule.mesh_dependent)
    return with_ffn(model, balance=kept or (Unbalanced(),))


def mesh_dependent(experiment: Experiment) -> list[str]:
    """The names of the balance rules that `verify` leaves out."""
    moe = experiment.model.moe
    return [rule.name for rule in moe.balance if rule.mesh_dependent] if moe else []


def _in_one_dtype(
    experiment: Experiment, model: Transformer, chosen: Callable[[str], bool]
) -> Iterator[Checked]:
    exact = model.dtype == "float64"
    tolerance, floor = TOLERANCES[model.dtype], FLOORS[model.dtype]
    num_devices = jax.device_count()
    wanted = [
        variant
        for variant in variants(experiment, model, num_devices)
        if chosen(variant.name) and (exact or variant.replayable)
    ]
    if not wanted:
        return
    axes = expert_axes(model)
    batch = make_batch(2 * num_devices)
    alone = dataclasses.replace(on_mesh(experiment, {}), num_microbatches=1)
    is_moe = model.moe is not None
    local = with_ffn(model, transport=Local()) if is_moe else model
    weights = experiment.objective.weights(model)

    def oracle(replay: Any = None) -> tuple[Outcome, Routed]:
        found, routed = outcome(alone, local, batch, replay=replay)
        return by_definition(found, routed.choices, batch, weights), routed

    expected, own = oracle()
    if unseen := zero_gradients(expected):
        _log.warning("zero on one device, so that little of it is compared: %s", ", ".join(unseen))
    for variant in wanted:
        check = functools.partial(
            Checked, name=variant.name, dtype=model.dtype, tolerance=tolerance
        )
        try:
            found, routed = outcome(
                variant.experiment, variant.model, padded(batch, variant.padding)
            )
        except UserError as error:
            yield check(worst=None, refused=str(error))
            continue
        against, flipped, margin = expected, None, None
        if not exact and is_moe:
            flipped = flips.share(routed.choices, own.choices, model.moe.num_experts)
        if flipped:
            against, replaying = oracle(replay=routed.choices)
            margin = flips.margin(routed.choices, own.choices, replaying.probs)
        differences = compare(found, against, axes, floor=floor)
        wrong = [d for d in differences if not d.error <= tolerance]
        worst = max(differences, key=lambda d: d.error)
        yield check(worst=worst, wrong=wrong, flipped=flipped, margin=margin)


def zero_gradients(found: Outcome) -> list[str]:
    """The names of the gradients that are zero everywhere."""
    return [name for name in found if name.startswith("gradient ") and not found[name].any()]


def make_batch(batch_size: int) -> Batch:
    """Packed documents of random tokens, of which most are one and the same.

    So some experts are hot, and transports have something to move. Behind most sequences there are
    up to 4 positions of padding, so that devices and microbatches differ in their number of tokens:
    with the same number in each, a mean of means would be right. The first quarter has none, which
    fills the transports' buffers.
    """
    rng = np.random.default_rng(0)
    shape = (batch_size, SEQUENCE_LENGTH)
    tokens, targets = rng.integers(0, VOCABULARY, (2, *shape), dtype=np.int32)
    tokens = np.where(rng.random(shape) < 0.6, 0, tokens).astype(np.int32)
    position = np.arange(SEQUENCE_LENGTH)
    cut = rng.integers(2, SEQUENCE_LENGTH - 4, (batch_size, 1))
    end = rng.integers(SEQUENCE_LENGTH - 4, SEQUENCE_LENGTH + 1, (batch_size, 1))
    end[: batch_size // 4] = SEQUENCE_LENGTH
    first = position < cut
    segments = np.where(first, 1, np.where(position < end, 2, 0)).astype(np.int32)
    positions = np.where(first, position, position - cut).astype(np.int32)
    last = (position == cut - 1) | (position == end - 1)
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_mask=(segments > 0) & ~last,
        segment_ids=segments,
        positions=np.where(segments > 0, positions, 0),
    )


def padded(batch: Batch, count: int) -> Batch:
    """The batch with `count` positions of padding behind every sequence.

    Tokens there have no embedding, which the model answers with NaN: it must reach nothing.
    """
    extend = lambda x, value: np.pad(x, ((0, 0), (0, count)), constant_values=value)
    return Batch(
        tokens=extend(batch.tokens, VOCABULARY),
        targets=extend(batch.targets, VOCABULARY - 1),
        loss_mask=extend(batch.loss_mask, False),
        segment_ids=extend(batch.segment_ids, 0),
        positions=extend(batch.positions, 0),
    )
