"""Routings that are hard on a transport: kinds by hand, and others searched at random."""

import functools

import numpy as np

from tests.parallel.random_loads import random_loads

T, E, K = 64, 16, 2  # tokens, experts (also the id of an empty slot), choices


@functools.cache
def routings() -> dict[str, np.ndarray]:
    """{what it is: the chosen experts, int32 `[T, K]`}."""
    return {name: experts.astype(np.int32) for name, experts in {**_by_hand(), **_found()}.items()}


def _by_hand() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    of_first = lambda n: np.stack([rng.permutation(n)[:K] for _ in range(T)])
    padded = of_first(E)
    padded[::3] = padded[1, 0] = E
    others = 1 + rng.integers(E - 1, size=T)
    return {
        "uniform": of_first(E),
        "one hot expert": np.stack([np.zeros(T, int), others], axis=1),
        "one hot expert, twice by each token": np.zeros((T, K)),
        "one hot device": of_first(2),  # of 8
        "one hot device, or two": of_first(4),  # of 4, or 8
        "padding and empty slots": padded,
        "no choices": np.full((T, K), E),
        # Devices that hold tokens, and owners of experts, as on the meshes of the test.
        "to the next of 8": _permuted(8, 8),
        "to the next of 4": _permuted(8, 4),
        "to the next of 2": _permuted(4, 2),
    }


def _permuted(num_shards: int, num_owners: int) -> np.ndarray:
    """Every device sends all its tokens to the next one."""
    shard = np.arange(T) // (T // num_shards)
    first = (shard + 1) % num_owners * (E // num_owners)
    return first[:, None] + np.arange(K)


def _found(number: int = 42) -> dict[str, np.ndarray]:
    """Loads of all families, with empty slots; in the order of the experts, in runs, shuffled."""
    rng = np.random.default_rng(1)
    found = {}
    for i, loads in enumerate(random_loads(number, E, 4, most=T * K, seed=3)):
        slots = np.repeat(np.arange(E + 1), [*loads, T * K - loads.sum()])
        if i % 3 == 1:
            runs = np.split(slots, np.sort(rng.integers(T * K, size=7)))
            slots = np.concatenate([runs[n] for n in rng.permutation(8)])
        elif i % 3 == 2:
            slots = rng.permutation(slots)
        found[f"searched {i}"] = slots.reshape(T, K)
    return found
