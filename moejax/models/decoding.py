"""Which rows a decoding cache can serve: a slot per position, written in order, by one sequence.

Attention sees every slot up to a query's own (`layers/decoding_cache.py`), so a call is right only
where they hold the row's own earlier tokens. The cache therefore knows how far each row is written
and by which segment, in the collection's entry `rows`. A call may go back and write anew: what
stands behind its last token is forgotten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from moejax.errors import UserError
from moejax.models.output import Passed, Variables
from moejax.types import Context, pytree

_ROWS = "rows"


@pytree
class Follows:
    """What a call means for the rows of the cache.

    Attributes:
      sound: whether the row's tokens are one sequence and stand where the cache goes on.
      rows: the cache's entries after the call; a row that is not sound has no slot any more.
    """

    sound: Bool[Array, "B"]
    rows: Variables

    def of_sound_rows(self, passed: Passed) -> Passed:
        """With NaN in every other row, and the rows' entries in the cache."""
        x = jnp.where(self.sound[:, None, None], passed.x, jnp.nan)
        return dataclasses.replace(passed, x=x, cache=passed.cache | self.rows)


def check_call(variables: Mapping[str, Any], *, decode: bool, positions: Any) -> None:
    """Raises UserError where there is a cache and the call would not go on in it.

    Without a number of slots it would be left aside, and the tokens read as if they were all; the
    default positions would write its first slots again.
    """
    if not variables.get("cache"):
        return
    if not decode:
        raise UserError(
            "the variables hold a decoding cache but the call has no cache_length: give that of "
            "init_cache to go on, or leave the collection 'cache' out to begin"
        )
    if positions is None:
        raise UserError(
            "decoding with a cache needs positions: say at which slot each token stands, such as "
            "the number of the row's tokens so far for the next one (or leave the collection "
            "'cache' out of the variables to begin)"
        )


def follow(cache: Mapping[str, Any] | None, context: Context) -> Follows:
    """Whether the tokens of `context` go on where each row of `cache` ends.

    A row's tokens, padding aside, must be of one segment, at consecutive positions that begin at
    most one behind the last that is written. A row without tokens stays as it is.

    Raises UserError for the first row where they are not. Where the values are not known before
    the program runs there is no error; the row has `sound` False and answers NaN.
    """
    batch = context.token_mask.shape[0]
    nothing = jnp.zeros((batch,), jnp.int32)
    before = (cache or {}).get(_ROWS, {"length": nothing, "segment_id": nothing})
    if before["length"].shape != (batch,):
        raise UserError(
            f"the cache was made for {before['length'].shape[0]} rows and the tokens have {batch}: "
            "make it with init_cache for as many"
        )
    real = jnp.asarray(context.token_mask)
    positions, ids = (jnp.asarray(a, jnp.int32) for a in (context.positions, context.segment_ids))
    own = lambda a: jnp.take_along_axis(a, jnp.argmax(real, axis=1)[:, None], axis=1)[:, 0]
    start, segment_id = own(positions), own(ids)
    count = real.sum(axis=1, dtype=jnp.int32)

    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    consecutive = (~real | (positions == start[:, None] + rank)).all(axis=1)
    of_one_segment = (~real | (ids == segment_id[:, None])).all(axis=1)
    on_written = (start >= 0) & (start <= before["length"])
    same_segment = (start == 0) | (segment_id == before["segment_id"])
    empty = count == 0
    sound = empty | (consecutive & of_one_segment & on_written & same_segment)
    if _known(sound) and not np.all(sound):
        raise UserError(_why(int(np.argmin(sound)), before, context))
    length = jnp.where(sound, start + count, 0)
    after = {"length": length, "segment_id": segment_id}
    rows = {name: jnp.where(empty, before[name], after[name]) for name in after}
    return Follows(sound=sound, rows={_ROWS: rows})


def _known(sound: Array) -> bool:
    return not isinstance(sound, jax.core.Tracer) and sound.is_fully_addressable


def _why(row: int, before: Mapping[str, Array], context: Context) -> str:
    real = np.asarray(context.token_mask)[row]
    positions = np.asarray(context.positions)[row][real]
    ids = {int(i) for i in np.asarray(context.segment_ids)[row][real]}
    length = int(before["length"][row])
    if length and positions[0]:
        ids.add(int(before["segment_id"][row]))
    if len(ids) > 1:
        return (
            f"row {row} has tokens of the segments {', '.join(map(str, sorted(ids)))}, and a row "
            "of the decoding cache is one sequence: decode each in a row of its own"
        )
    shown = ", ".join(map(str, positions[:4])) + (", ..." if len(positions) > 4 else "")
    written = f"up to position {length - 1}" if length else "nowhere"
    return (
        f"row {row} has tokens at the positions {shown}, and its cache is written {written}: give "
        "positions that go on from there one by one (from 0 in a new cache), whatever padding "
        "stands before or between"
    )
