"""The processes of one run: how they find each other, agree, and end together.

With one process everything here does nothing. With several, each runs the same command, and the
environment says which one it is (`launch/local.sh` sets it):

    MOEJAX_COORDINATOR     host:port of the first process, or `auto` to let JAX find out
                           (Slurm, Open MPI, TPU pods), which needs no other variable
    MOEJAX_NUM_PROCESSES   how many there are
    MOEJAX_PROCESS_ID      0 for the first

Agreement goes through JAX's coordination service, not through collectives: it works before the
first program is compiled, for hours if need be, and between processes that differ. All of them
must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax

from moejax.errors import UserError

COORDINATOR = "MOEJAX_COORDINATOR"
NUM_PROCESSES = "MOEJAX_NUM_PROCESSES"
PROCESS_ID = "MOEJAX_PROCESS_ID"
AUTO = "auto"

_JOIN_SECONDS = 300  # in which all processes must have been started
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # tokenising takes hours; a lost process is noticed by JAX
_FAREWELL_MS = 3000  # for others that stop for the same reason

T = TypeVar("T")
# Numbers of the exchanges and barriers, the same in every process.
_next_exchange = functools.partial(next, itertools.count())
_next_barrier = functools.partial(next, itertools.count())


# ---- joining and leaving -------------------------------------------------------------------------


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it this process is part of the run that the environment describes.

    Enter it before anything that starts JAX's backend. Leaving waits for the other processes. An
    error ends this process at once, with status 2 for a UserError: left to itself, it would wait
    at exit for processes that wait for it.

    Raises UserError where the environment is incomplete or the others cannot be reached.
    """
    if not start():
        yield
        return
    try:
        yield
        barrier("end")
    except BaseException as error:
        _leave(error)


def start() -> bool:
    """Joins the run that the environment describes; False where it describes none."""
    settings = _settings(os.environ)
    if settings is None:
        return False
    # Its handler would swallow a SIGTERM that comes before training; see `signals.py` for ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(initialization_timeout=_JOIN_SECONDS, **settings)
    except (RuntimeError, ValueError) as error:
        where = settings.get("coordinator_address", AUTO)
        raise UserError(
            f"the processes of this run did not find each other ({COORDINATOR}={where}): "
            f"{' '.join(str(error).split())[:200]}; start all of them within {_JOIN_SECONDS} s, "
            "and check that the port is free and can be reached"
        ) from error
    return True


def _settings(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None for a process on its own."""
    given = {name: environment.get(name) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    if not any(given.values()):
        return None
    if given[COORDINATOR] == AUTO:
        return {}
    for name, value in given.items():
        if not value:
            raise UserError(
                f"the environment describes a run of several processes, but {name} is not set: set "
                f"all of {', '.join(given)}, or unset all"
            )
    count, number = (_integer(name, given[name]) for name in (NUM_PROCESSES, PROCESS_ID))
    if not 0 <= number < count:
        raise UserError(
            f"{PROCESS_ID}={number} must be at least 0 and below {NUM_PROCESSES}={count}"
        )
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": count,
        "process_id": number,
        "cluster_detection_method": "deactivate",
    }


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name}={text!r} must be a whole number") from error


def _leave(error: BaseException) -> NoReturn:
    if isinstance(error, UserError):
        status = 2
        print(f"error: {error}", file=sys.stderr)
    else:
        status = 1
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):  # where all fail alike, the first waits for the others
        _service().wait_at_barrier("moejax/failed", _FAREWELL_MS)
        jax.distributed.shutdown()
    os._exit(status)


# ---- agreement -----------------------------------------------------------------------------------


def is_first() -> bool:
    """True in the one process that lists, renames and deletes, and writes what is not sharded."""
    return index() == 0


def others_depend_on_this() -> bool:
    """True in the process without which JAX ends the others at once: it should be the last."""
    state = _state()
    return state.client is not None and state.num_processes > 1 and state.process_id == 0


def num_processes() -> int:
    """How many processes this run has. Does not start JAX's backend where they have joined."""
    state = _state()
    return jax.process_count() if state.client is None else state.num_processes


def index() -> int:
    """The number of this process, 0 for the first. Does not start JAX's backend either."""
    state = _state()
    return jax.process_index() if state.client is None else state.process_id


def barrier(name: str) -> None:
    """Waits until every process has come here; `name` must be the same in all."""
    if num_processes() > 1:
        _service().wait_at_barrier(f"moejax/barrier/{_next_barrier()}/{name}", _PATIENCE_MS)


def exchange(mine: str, decide: Callable[[list[str]], str]) -> str:
    """What the first process decides, given every process's text in order; in every process."""
    if num_processes() == 1:
        return decide([mine])
    service, number = _service(), _next_exchange()
    place = f"moejax/exchange/{number}"
    if not is_first():
        service.key_value_set(f"{place}/{index()}", mine)
        return service.blocking_key_value_get(f"{place}/decision", _PATIENCE_MS)
    others = (f"{place}/{process}" for process in range(1, num_processes()))
    decision = decide([mine, *(service.blocking_key_value_get(o, _PATIENCE_MS) for o in others)])
    service.key_value_set(f"{place}/decision", decision)
    if number:  # whoever came here has read the decision before
        service.key_value_delete(f"moejax/exchange/{number - 1}/")
    return decision


def all_agree(ok: bool) -> bool:
    """True where `ok` is True in every process."""
    decision = exchange("yes" if ok else "no", lambda all_: "no" if "no" in all_ else "yes")
    return decision == "yes"


def from_first(values: Sequence[int]) -> list[int]:
    """The first process's integers, in every process."""
    return json.loads(exchange(json.dumps(list(values)), lambda all_: all_[0]))


def publish(place: str, mine: str) -> None:
    """Leaves `mine` for the others, at a place of this process's own. Waits for nobody."""
    if num_processes() > 1:
        _service().key_value_set(f"moejax/{place}/{index()}", mine)


def take_published(place: str) -> dict[int, str]:
    """What has been left at a place, by process, which empties it. Waits for nobody."""
    if num_processes() == 1:
        return {}
    service = _service()
    found = service.key_value_dir_get(f"moejax/{place}/")
    service.key_value_delete(f"moejax/{place}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}


def by_first(action: Callable[[], T]) -> T | None:
    """Runs `action` in the first process alone, while the others wait.

    Returns its result there and None elsewhere. A UserError or OSError of it is raised there, and
    in the others as a UserError of process 0.
    """
    result, problem = None, None
    if is_first():
        try:
            result = action()
        except (UserError, OSError) as error:
            problem = error
    text = exchange("" if problem is None else str(problem), lambda all_: all_[0])
    if problem is not None:
        raise problem
    if text:
        raise UserError(f"in process 0: {text}")
    return result


def first_then_others(action: Callable[[], T]) -> T:
    """`action` in the first process, then in the others: they find in the cache what it made.

    Where they do not see its cache, they make their own.
    """
    result = by_first(action)
    return result if is_first() else action()


def _service() -> Any:
    client = _state().client
    if client is None:
        raise UserError(
            f"this run has {num_processes()} processes that were not brought together: set "
            f"{COORDINATOR}={AUTO} in all of them"
        )
    return client


def _state() -> Any:
    """What JAX knows of the run's processes; it has no public name (Orbax uses it too)."""
    from jax._src import distributed

    return distributed.global_state
