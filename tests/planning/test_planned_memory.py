"""Memory by kind is what the shards of the state's leaves add up to, and what XLA says."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.planning import text
from moejax.planning.memory import (
    by_kind,
    memory_of,
    most_copied,
    needed_by_refusal,
)
from moejax.planning.topology import parse
from moejax.train.assemble import assemble
from tests.planning import planned


def real_state(experiment, step):
    """The state as a run makes it, on the simulated devices."""
    model = step.model
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = experiment.build_optimizer(shapes["params"])
    tokens = np.ones(model.vocab_size, np.int32)
    with jax.set_mesh(step.mesh):
        run = assemble(experiment, model, optimizer, step.mesh, token_bytes=tokens)
        return run.initial_state()


def bytes_on_first_device(tree):
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.slow
def test_kinds_are_the_bytes_of_a_real_state():
    experiment, _, step, _ = planned.compiled()
    found, state = by_kind(step), real_state(experiment, step)
    others = (state.router_state, state.guard, state.step, jax.random.key_data(state.key))
    assert found == {
        "parameters": bytes_on_first_device(state.params),
        "optimiser": bytes_on_first_device(state.opt_state),
        "other state": bytes_on_first_device(others),
        "batch": 4 * 8 * 64 * 4 // 8 + 8 * 64 // 8,  # four of int32 and a mask
    }


@pytest.mark.slow
def test_what_is_needed_is_all_of_it():
    _, _, step, _ = planned.compiled()
    memory, stats = memory_of(step, None), step.program.memory_analysis()
    assert memory.temporaries == stats.temp_size_in_bytes > 0
    assert memory.needed >= stats.argument_size_in_bytes + stats.temp_size_in_bytes
    unused = sum(memory.held.values()) + memory.padding - stats.argument_size_in_bytes
    assert 0 <= unused < 10_000  # what the step does not read, such as positions
    assert memory.fits
    assert not memory_of(step, memory.needed - 1).fits
    assert memory_of(step, memory.needed).fits


@pytest.mark.slow
def test_what_lies_on_several_devices_is_named():
    _, _, step, _ = planned.compiled()
    first, *others = most_copied(step, 100)
    assert all(first.num_bytes >= leaf.num_bytes for leaf in others)
    norm = next(leaf for leaf in (first, *others) if leaf.path.endswith("ffn_norm/scale"))
    assert (norm.copies, norm.num_bytes) == (8, 2 * 32 * 4)  # two layers in one stack
    experts = [leaf.path for leaf in (first, *others) if "/experts/" in leaf.path]
    assert not experts  # split over all eight


@pytest.mark.slow
def test_a_refused_program_still_says_what_the_state_takes():
    _, _, step, _ = planned.compiled()
    text = "RESOURCE_EXHAUSTED: Ran out of memory on HBM. Used 120.50G of 95.74G hbm."
    refused = dataclasses.replace(step, program=None, refusal=text)
    memory = memory_of(refused, 2**36)
    assert memory.held == by_kind(step)
    assert memory.needed == int(120.5 * 2**30)
    assert memory.temporaries is None
    assert not memory.fits
    text = "the total memory required for HLO temporaries (64.50G) exceeds available HBM"
    memory = memory_of(dataclasses.replace(refused, refusal=text), 2**36)
    assert memory.needed == int(64.5 * 2**30) + sum(memory.held.values())
    # Of one that says less, at least that it is too much.
    assert memory_of(dataclasses.replace(refused, refusal="no"), 2**36).needed == 2**36 + 1


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("the total memory required for HLO temporaries (960.00G) exceeds", 960 * 2**30),
        ("Used 512.0M of 1.0G hbm", 2**29),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_that_it_needs(text, needed):
    assert needed_by_refusal(text) == needed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "share", "expected"),
    [("h100:1x8", 0.801, "to 0.81 or more"), ("h100:1x8", 0.74, None), ("v5p:2x2x2", 0.9, None)],
)
def test_a_plan_that_needs_more_than_jax_takes_says_so(topology, share, expected):
    where = parse(topology)
    needed = int(share * where.chip.memory)
    memory = dataclasses.replace(planned.plan().memory, needed=needed, capacity=where.chip.memory)
    said = text.describe(dataclasses.replace(planned.plan(), topology=where, memory=memory))
    assert ("XLA_CLIENT_MEM_FRACTION" in said) == (expected is not None)
    assert expected is None or expected in said
