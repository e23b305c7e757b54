"""One smoke step that is compiled once for several tests, and the way to name contracts."""

import functools
import pathlib
import re
import shlex

import jax

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.config.overrides import apply_overrides
from moejax.planning.compile import compile_step, vocabulary
from moejax.planning.plan import plan_of
from moejax.planning.topology import parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONTRACTS = ROOT / "configs" / "contracts"
SMOKE = ("configs/olmoe_1b_7b.py:smoke", ("mesh.fsdp=4", "mesh.expert=2", "batch_size=8"))


def experiment(spec, *overrides):
    path, _, function = spec.partition(":")
    return build_config(apply_overrides(load_config(f"{ROOT / path}:{function}"), list(overrides)))


@functools.cache
def compiled(spec=SMOKE[0], overrides=SMOKE[1], topology="cpu:8"):
    """(experiment, topology, compiled step, vocabulary)."""
    found, where = experiment(spec, "mesh.data=null", *overrides), parse(topology)
    size = vocabulary(found)
    return found, where, compile_step(found, where.devices(), vocab_size=size), size


@functools.cache
def plan(spec=SMOKE[0], overrides=SMOKE[1], topology="cpu:8"):
    found, where, step, size = compiled(spec, overrides, topology)
    return plan_of(found, where, step, vocab_size=size)


def jax_minor():
    return ".".join(jax.__version__.split(".")[:2])


def command(path):
    """(config, overrides, topology) of the command in a contract's first line."""
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# moejax plan "))
    topology = words[words.index("--topology") + 1]
    overrides = [word for word in words[1:] if re.fullmatch(r"[\w.]+=.*", word)]
    return words[0], tuple(overrides), topology
