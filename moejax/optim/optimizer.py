"""AdamW with a decay mask by parameter name and clipping by the global norm.

Loshchilov and Hutter 2019 (decoupled weight decay), on optax.

**What decays.** A rule by number of axes would be wrong here: parameters of stacked layers carry a
leading layer axis, so a norm scale is `[L, D]` and looks like a matrix. The default therefore goes
by name (`DEFAULT_NO_DECAY`): norm scales, biases, attention sinks and embeddings do not decay,
everything else with two or more axes does. Embeddings are left out as in OLMo 2 (2025, section
3.2): decay shrinks them, and small embeddings raise the gradients of the first layers. A head tied
to the embedding is the same leaf and does not decay either.

**Precision.** Moments and every step of the arithmetic are at least float32, whatever the
parameters' dtype (a bf16 second moment stops changing once it is 256 times its increments).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from moejax.errors import UserError
from moejax.optim.paths import map_named, match_all, matches
from moejax.optim.schedule import WSD, WarmupCosine
from moejax.types import at_least_f32, named_leaves

DEFAULT_NO_DECAY = ("*norm*", "*scale", "*bias*", "*sinks", "embed*", "*/embed*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW; `build` needs the run's number of steps, which the schedule does not own.

    `no_decay` None is the rule by name above; a tuple of globs over parameter paths replaces it,
    and then each of them must match something. `clip_norm` None does not clip.
    """

    schedule: WarmupCosine | WSD
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] | None = None
    clip_norm: float | None = 1.0

    def build(self, params: Any, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation for `params` (arrays or ShapeDtypeStructs; only names are used).

        `update` takes the keyword `grad_norm`, the gradient's global norm, which the step computes
        in any case. Updates are at least float32; `optax.apply_updates` rounds to the parameters'
        dtype.
        Raises UserError for a value out of range or a pattern that matches nothing.
        """
        self._check()
        mask = decay_mask(params, self.no_decay)
        parts = [
            optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=mask),
            optax.scale_by_learning_rate(self.schedule.build(steps)),
        ]
        if self.clip_norm is not None:
            parts.insert(0, _clip(self.clip_norm))
        return _in_f32(optax.chain(*parts))

    def _check(self) -> None:
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"AdamW: {name}={getattr(self, name)} must lie in [0, 1)")
        if not (0 < self.eps < math.inf and 0 <= self.weight_decay < math.inf):
            raise UserError(
                f"AdamW: eps={self.eps} must be above 0 and weight_decay={self.weight_decay} "
                "must be 0 or more, both finite"
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise UserError(
                f"AdamW: clip_norm={self.clip_norm} must be above 0 and finite; None does not clip"
            )


def decay_mask(params: Any, no_decay: tuple[str, ...] | None = None) -> Any:
    """A tree of bools like `params`: True where weight decay applies.

    Leaves with fewer than two axes never decay. Raises UserError where a given pattern matches
    nothing; the default patterns may.
    """
    if no_decay is not None:
        match_all(no_decay, list(named_leaves(params)), field="no_decay")
    patterns = DEFAULT_NO_DECAY if no_decay is None else no_decay
    return map_named(lambda path, x: x.ndim >= 2 and not matches(path, patterns), params)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm over all leaves, at least float32 whatever their dtype.

    The step reports it for the raw gradient, before clipping, and for the update.
    """
    return optax.tree.norm(_cast(tree))


def _cast(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(at_least_f32(x.dtype)), tree)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scales by min(1, max_norm / grad_norm); a norm that is not finite makes the update NaN."""

    def update(updates, state, params=None, *, grad_norm, **_):
        factor = jnp.minimum(1.0, max_norm / grad_norm)
        factor = jnp.where(jnp.isfinite(grad_norm), factor, jnp.nan)  # of inf it would be 0
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _in_f32(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner` on values of at least float32, so that its state (the moments) is too."""

    def update(updates, state, params=None, **extra):
        params = None if params is None else _cast(params)
        return inner.update(_cast(updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(_cast(params)), update)
