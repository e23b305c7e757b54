"""Chooses a plan that keeps every device within its rows and weight slots, and what follows of it.

Everything is computed from loads that all devices know, in integers, so all devices choose alike
and a plan may decide which collectives run. (Nguyen et al., Least-Loaded Expert Parallelism, arXiv
2601.17111, with the plan of MoonEP, Moonshot AI, where its foreign experts do not fit.)
"""

from __future__ import annotations

import dataclasses
import fractions
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import ArrayLike, Bool, Int

from moejax.errors import UserError
from moejax.kernels import compat
from moejax.parallel import planners

ALPHA = 1.05  # capacity of a device over the mean load
SKIP_BELOW = 1.3  # lambda of the paper: largest over mean load up to which nothing moves

_Count = TypeVar("_Count", int, Array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Who computes what. F is the number of slots for foreign experts on each device.

    Attributes:
      rows: rows of expert e that device p computes.
      slots: the foreign experts of each device by ascending id; E where a slot is empty.
      most_rows: on the fullest device; more than it can hold at a time take several rounds.
      has_foreign: whether any device computes an expert that it does not own.
    """

    rows: Int[Array, "E P"]
    slots: Int[Array, "P F"]
    most_rows: Int[Array, ""]
    has_foreign: Bool[Array, ""]


def rebalance(
    loads: Int[ArrayLike, " E"],
    num_devices: int,
    *,
    alpha: float = ALPHA,
    skip_below: float = SKIP_BELOW,
    min_chunk: int,
    num_rows: int,
    num_slots: int,
) -> Plan:
    """The first of these plans that fits, for T = sum(loads) and C = ceil(alpha T / P):

    1. native, if no device has `skip_below` times the mean load or more than `num_rows` rows;
    2. least-loaded with capacity C, if no device needs more than `num_rows` rows or `num_slots`
       foreign experts;
    3. one-owner with capacity min(C, num_rows), if no device needs more than `num_slots` foreign
       experts (E/P are always enough);
    4. the same, where each device keeps its `num_slots` largest foreign experts and the others go
       back to their owners, who may then need several rounds of `num_rows` rows.

    Nothing is ever dropped. Works under jit, scan, remat and shard_map, for loads that are the same
    on every device.

    Args:
      loads: rows per expert, none negative, with a sum below 2^31.
      num_devices: P; it divides E.
      alpha: capacity over the mean load, at least 1; rounded to thousandths.
      skip_below: lambda of the paper; rounded to thousandths. 0 never skips.
      min_chunk: the fewest rows for which moving an expert pays: see `min_chunk_from`.
      num_rows: rows that a device holds at a time: see the function `num_rows`.
      num_slots: F, foreign experts that a device holds.

    Raises:
      ValueError: E is not a multiple of `num_devices`, or `loads` is no vector of integers.
      UserError: `alpha`, `num_rows` or `num_slots` is too small.
    """
    _check(alpha, num_rows, num_slots)
    at_home = planners.native(loads, num_devices)
    loads = jnp.asarray(loads, jnp.int32)
    total = loads.sum(dtype=jnp.int32)

    def moved() -> Array:
        capacity = ceil_of_mean(total, num_devices, alpha)
        plan = planners.least_loaded(loads, num_devices, capacity, min_chunk=min_chunk)
        fits = (most_rows(plan) <= num_rows) & (most_foreign(plan) <= num_slots)
        return lax.cond(fits, lambda: plan, lambda: from_one_owner(capacity))

    def from_one_owner(capacity: Array) -> Array:
        mean = ceil_of_mean(total, num_devices, 1)
        capacity = jnp.maximum(jnp.minimum(capacity, num_rows), mean)
        plan = planners.one_owner(loads, num_devices, capacity)
        return plan if num_slots >= loads.shape[0] // num_devices else truncated(plan, num_slots)

    most = most_rows(at_home)
    balanced = (most < ceil_of_mean(total, num_devices, skip_below)) & (most <= num_rows)
    rows = lax.cond(balanced, lambda: at_home, moved)
    return Plan(
        rows=rows,
        slots=_slots(rows, num_slots),
        most_rows=most_rows(rows),
        has_foreign=most_foreign(rows) > 0,
    )


def split_by_source(rows: Int[Array, "E P"], counts: Int[Array, "Q E"]) -> Int[Array, "Q E P"]:
    """How many of source q's rows of expert e go to device p.

    The rows of an expert are numbered through the sources in order, and the devices take
    consecutive ranges of these numbers, in order. Sums over p give `counts`, sums over q `rows`.

    Args:
      rows: of a plan.
      counts: rows of each source for each expert; their sums over sources are those of `rows` over
        devices.
    """
    source_ends = jnp.cumsum(counts, axis=0, dtype=jnp.int32)
    device_ends = jnp.cumsum(rows, axis=1, dtype=jnp.int32)
    ends = jnp.minimum(source_ends[:, :, None], device_ends)
    starts = jnp.maximum((source_ends - counts)[:, :, None], device_ends - rows)
    return jnp.maximum(ends - starts, 0).astype(jnp.int32)


def truncated(rows: Int[Array, "E P"], num_slots: int) -> Int[Array, "E P"]:
    """The plan with only the `num_slots` largest foreign experts of each device.

    Of equal ones the lower id stays. The rows of the others return to their owners.
    """
    owner = planners.is_owner(*rows.shape)
    experts = jnp.arange(rows.shape[0])[:, None]

    def without_largest(left: Array, _) -> tuple[Array, None]:
        return jnp.where(experts == jnp.argmax(left, axis=0), 0, left), None

    foreign = jnp.where(owner, 0, rows)
    back, _ = lax.scan(without_largest, foreign, length=num_slots)
    return rows - back + jnp.where(owner, back.sum(1, dtype=jnp.int32)[:, None], 0)


def most_rows(rows: Int[Array, "E P"]) -> Int[Array, ""]:
    """The load of the fullest device."""
    return rows.sum(0, dtype=jnp.int32).max()


def most_foreign(rows: Int[Array, "E P"]) -> Int[Array, ""]:
    """The number of foreign experts on the device that has most of them."""
    return _is_foreign(rows).sum(0, dtype=jnp.int32).max()


def num_rows(
    rows_per_device: int,
    num_devices: int,
    *,
    alpha: float = ALPHA,
    skip_below: float = SKIP_BELOW,
    min_chunk: int,
) -> int:
    """Rows that suffice for every device under plans 1 and 2 of `rebalance`, whatever the loads.

    With A rows on each of P devices before they are sent, and T <= P A of them routed, that is the
    larger of ceil(lambda A) - 1, below which nothing moves, and, over all T,

        min(T, C + max(0, (P - 2) (m - 1) - (P C - T))),    C = ceil(alpha T / P).

    The second term of the sum is 0 at T = P A once alpha >= 1 + (P - 2) (m - 1) / (P A); at smaller
    T all of a hot expert may be forced on one device.

    Args:
      rows_per_device: A.
      num_devices: P.
      alpha, skip_below, min_chunk: as for `rebalance`; lambda and m above.
    """
    _check(alpha, 1, 0)
    total = num_devices * rows_per_device
    slack = max(0, (num_devices - 2) * (max(min_chunk, 1) - 1))

    def bound(routed: int) -> int:
        capacity = ceil_of_mean(routed, num_devices, alpha)
        return min(routed, capacity + max(0, slack - (num_devices * capacity - routed)))

    # While C stays the same the bound grows with T. Over the last T of every C it grows up to
    # (P - 1) C = slack, and then is linear in C, rounded down: so its largest value is at an end.
    ratio = fractions.Fraction(num_devices) / _exact(alpha)
    turn = slack // max(num_devices - 1, 1)
    last = ceil_of_mean(total, num_devices, alpha) - 1
    ends = {math.floor(capacity * ratio) for capacity in (turn, turn + 1, last)}
    most = max(bound(routed) for routed in {total} | {end for end in ends if 0 <= end < total})
    balanced = ceil_of_mean(total, num_devices, skip_below) - 1
    return min(total, max(most, balanced))


def min_chunk_from(
    flops_per_second: float, bytes_per_second: float, bytes_per_weight: float
) -> int:
    """The fewest rows for which moving an expert's weights takes no longer than its work.

    An expert of p weights of b bytes moves in p b / W seconds and multiplies t rows in 2 p t / F,
    so the two are equal at t = b F / (2 W) rows, whatever the size of the expert.

    Args:
      flops_per_second: F, of one device in grouped matmuls, as measured.
      bytes_per_second: W, of one device's link to another, as measured.
      bytes_per_weight: b, of the weights as they are sent.
    """
    return max(1, math.ceil(bytes_per_weight * flops_per_second / (2 * bytes_per_second)))


def ceil_of_mean(total: _Count, num_devices: int, factor: float) -> _Count:
    """ceil(factor total / P), exact for a factor in thousandths and without overflow in int32."""
    exact = _exact(factor)
    divisor = exact.denominator * num_devices
    if divisor * exact.numerator >= 2**31:
        raise UserError(
            f"the factor {factor} is too large or too fine for {num_devices} devices: use at most "
            "two digits behind the point"
        )
    whole, rest = total // divisor, total % divisor
    return whole * exact.numerator - (-rest * exact.numerator) // divisor


def _exact(factor: float) -> fractions.Fraction:
    return fractions.Fraction(round(1000 * factor), 1000)


def _is_foreign(rows: Array) -> Array:
    return (rows > 0) & ~planners.is_owner(*rows.shape)


def _slots(rows: Array, num_slots: int) -> Array:
    """Foreign experts of each device by ascending id, `[P, F]`; E where there are no more."""
    num_experts, num_devices = rows.shape
    experts = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    ids = jnp.where(_is_foreign(rows), experts, num_experts)  # [E, P]

    def next_one(last: Array, _) -> tuple[Array, Array]:
        found = jnp.where(ids > last, ids, num_experts).min(axis=0)
        return found, found

    none = compat.zeros((num_devices,), jnp.int32, like=rows) - 1
    return lax.scan(next_one, none, length=num_slots)[1].T


def _check(alpha: float, num_rows: int, num_slots: int) -> None:
    if alpha < 1:
        raise UserError(f"alpha={alpha} leaves no room for all rows: use at least 1")
    if num_rows < 1:
        raise UserError(f"num_rows={num_rows} must be at least 1: see rebalance.num_rows")
    if num_slots < 0:
        raise UserError(f"num_slots={num_slots} must not be negative")
