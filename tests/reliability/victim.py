"""The ordinary `moejax` command in a forked process, with places at which it can be killed.

The package knows nothing of this: its functions are wrapped from outside. The process that forks
has imported everything, so that a restart costs what a restart computes, and not what it imports.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable

# Phase: the function that is it. Each has two places, before and after.
PHASES = {
    "claim of the workdir": "moejax.config.run_directory:claim",
    "data preparation": "moejax.data.pipeline:Data.prepare",
    "entry of the data cache": "moejax.data.cache:_replace",
    "tokenizer file": "moejax.data.tokenizer:Tokenizer.save",
    "restore or fresh state": "moejax.train.loop:restore_or_init",
    "arrays read": "moejax.train.array_store:ArrayStore.read",
    "metrics file opened": "moejax.train.writers:JsonLines.__init__",
    "record": "moejax.train.writers:JsonLines.write",
    "batch": "moejax.data.prefetch:Prefetch.__next__",
    "evaluation": "moejax.train.evaluate:Evaluator.run_until",
    "save": "moejax.train.checkpoint:Checkpointer.save",
    "leftovers cleared": "moejax.train.step_directory:StepDirectory.clean",
    "arrays handed over": "moejax.train.array_store:ArrayStore.write",
    "manifest": "moejax.train.array_store:_LateJson.write",
    "arrays on disk": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler:"
    "PyTreeCheckpointHandler.finalize",
    "commit": "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize",
    "deletion": "moejax.train.step_directory:StepDirectory.delete",
    "set aside": "moejax.train.step_directory:StepDirectory.set_aside",
    "final evaluation": "moejax.train.finish:finish",
    "report": "moejax.analysis.report:write_report",
}
STEP = "step"  # not a function but a field of what `assemble` returns
PLACES = tuple(f"{side} {phase}" for phase in (*PHASES, STEP) for side in ("before", "after"))

_IMPORTED = (
    "moejax.commands.train",
    "moejax.commands.given_model",
    "moejax.config.build",
    "moejax.config.check",
    "moejax.config.load",
    "moejax.train.loop",
    "tensorboardX",
    *(target.partition(":")[0] for target in PHASES.values()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The process kills itself when it comes to `name`, one of PLACES, for the `count`-th time."""

    name: str
    count: int = 1


def import_everything() -> None:
    """What victims need, once, in the process that forks; starts neither threads nor devices."""
    for name in _IMPORTED:
        importlib.import_module(name)
    import jax
    from jax._src import xla_bridge

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    assert not xla_bridge.backends_are_initialized()


def start(words: list[str], *, log: str, passed: str, place: Place | None = None) -> int:
    """Forks a process that runs `moejax *words`; its pid.

    Its output goes to the end of `log`. The names of the places that it passes go to `passed`, one
    per line.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        wrap_all(_killer(os.open(passed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), place))
        from moejax.commands import main

        status = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the parent's exit handlers are not this process's


def _killer(passed: int, place: Place | None) -> Callable[[str], None]:
    times = dict.fromkeys(PLACES, 0)

    def at(name: str) -> None:
        os.write(passed, f"{name}\n".encode())
        times[name] += 1
        if place is not None and (place.name, place.count) == (name, times[name]):
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def wrap_all(at: Callable[[str], None]) -> None:
    """From here on `at` is called with the name of each of PLACES that this process comes to."""
    for phase, target in PHASES.items():
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, _wrapped(getattr(owner, name), phase, at))

    from moejax.train import loop

    assemble = loop.assemble

    def assembled(*args, **kwargs):
        found = assemble(*args, **kwargs)
        return dataclasses.replace(found, train_step=_wrapped(found.train_step, STEP, at))

    loop.assemble = assembled


def _wrapped(function, phase: str, at):
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def later(*args, **kwargs):
            at(f"before {phase}")
            result = await function(*args, **kwargs)
            at(f"after {phase}")
            return result

        return later

    @functools.wraps(function)
    def now(*args, **kwargs):
        at(f"before {phase}")
        result = function(*args, **kwargs)
        at(f"after {phase}")
        return result

    return now
