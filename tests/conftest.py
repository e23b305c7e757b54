"""Every test sees eight simulated CPU devices, a compilation cache, and checked annotations."""

import importlib.metadata
import logging
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of the CPU client. A simulated device that waits in a collective holds one; with as few as
# there are processors, two devices in two collectives can wait for each other for ever.
os.environ.setdefault("NPROC", "16")
os.environ["MOEJAX_KERNELS"] = os.devnull + "/none"  # not what this machine's user has accepted
# Tests compile much and compute little: without LLVM's optimisations they take half the time, and
# a third of that with the emitters of loops that need no MLIR. jaxlib 0.11 has these no longer, and
# ends the process at a flag that it does not know.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
else:
    # Without optimisations, jaxlib 0.12 runs collectives of one device at once in an order of its
    # own, and on a busy machine it pairs one device's with another of its neighbour's: wrong rows,
    # or a process that waits until XLA ends it. Not with the plain scheduler.
    _FLAGS.append("--xla_cpu_enable_concurrency_optimized_scheduler=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

import jax  # noqa: E402  (after the environment is set)
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import checked_trees  # noqa: E402

_ROOT = pathlib.Path(__file__).resolve().parent.parent

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(_ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Arguments, results, and the fields of dataclasses are checked against their annotations in all of
# moejax that this process imports from here on. An int may stand for a float, as PEP 484 has it.
# Of a list the first item is looked at, and not a random one, so that a failure repeats itself.
checked_trees.register_dataclasses_of("moejax")
jaxtyping.install_import_hook(
    "moejax",
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_random=False))",
)


@pytest.fixture(autouse=True)
def own_log():
    """What a command sets up for its log, with the standard error of that test, ends with it."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers


@pytest.fixture
def unchecked(monkeypatch):
    """Annotations are not checked, so that the package's own answer to bad arguments is reached."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
