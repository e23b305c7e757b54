"""Random loads of experts in families that are hard for planners in different ways."""

import numpy as np


def _dirichlet(rng, num_experts, _):
    return rng.dirichlet(np.full(num_experts, 10 ** rng.uniform(-2, 1)))


def _hot_experts(rng, num_experts, _):
    share = np.full(num_experts, (1 - (hot := rng.uniform(0, 1))) / num_experts)
    chosen = rng.choice(num_experts, rng.integers(1, num_experts // 2 + 2), replace=False)
    share[chosen] += hot / len(chosen)
    return share


def _hot_devices(number):
    """Of so many devices (counted from the end if negative) each has more than the mean."""

    def draw(rng, num_experts, num_devices):
        weight = np.full(num_devices, rng.uniform(0, 0.2))
        hot = rng.permutation(num_devices)[: int(np.clip(number % num_devices, 1, num_devices))]
        weight[hot] = 1 + rng.uniform(0, 0.1, len(hot))
        within = rng.dirichlet(
            np.full(num_experts // num_devices, 10 ** rng.uniform(-1, 2)), num_devices
        )
        return (weight[:, None] * within).reshape(-1)

    return draw


def _half_of_the_devices(rng, num_experts, num_devices):
    return _hot_devices(num_devices // 2)(rng, num_experts, num_devices)


def _zipf(rng, num_experts, _):
    return rng.permutation(np.arange(1, num_experts + 1) ** -rng.uniform(0.3, 2))


def _block(rng, num_experts, _):
    """Equal loads on consecutive experts and none elsewhere: ties everywhere."""
    length = rng.integers(1, num_experts + 1)
    return np.roll(np.arange(num_experts) < length, rng.integers(num_experts)).astype(float)


FAMILIES = (
    _dirichlet,
    _hot_experts,
    _hot_devices(1),
    _hot_devices(-1),
    _half_of_the_devices,
    _zipf,
    _block,
)


def random_loads(
    number: int, num_experts: int, num_devices: int, *, most: int, seed: int = 0
) -> np.ndarray:
    """int32 `[number, E]`, the families in turn; every sum between 0 and `most`, many at `most`."""
    rng = np.random.default_rng(seed)
    loads = np.empty((number, num_experts), np.int32)
    for i in range(number):
        share = FAMILIES[i % len(FAMILIES)](rng, num_experts, num_devices)
        total = most if rng.random() < 0.5 else rng.integers(most + 1)
        loads[i] = share / share.sum() * total
        if rng.random() < 0.5:  # all rows; the other half keeps exact ties
            loads[i, rng.integers(num_experts)] += total - loads[i].sum()
    return loads
