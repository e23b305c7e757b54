"""Loads per expert that planners are compared on: the paper's scenarios, Zipf, recorded traces."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from moejax.analysis.history import build_history
from moejax.analysis.metrics_file import read_metrics


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a router chose, on `num_devices`.

    Attributes:
      loads: rows per expert, `[steps, layers, E]`.
      history: the first so many steps are what planners may know, and are not counted; of a single
        step none.
    """

    group: str
    name: str
    loads: np.ndarray
    num_devices: int
    history: int = 1


# Experts, tokens per device, choices per token (arXiv 2601.17111, figure 4; 8 devices).
MODELS = {
    "gpt-oss-120b": (128, 32 * 1024, 4),
    "DeepSeek-V3": (256, 16 * 1024, 8),
    "Kimi-K2": (384, 16 * 1024, 8),
}


def paper_scenarios(steps: int, seed: int) -> list[Workload]:
    """p% of the rows evenly on h consecutive experts from 0 on, the rest evenly on the others."""
    rng = np.random.default_rng(seed)
    found = []
    for model, (num_experts, tokens, choices) in MODELS.items():
        rows = 8 * tokens * choices
        scenarios = {"balanced": np.full(num_experts, 1 / num_experts)}
        for percent in (30, 50, 80, 95):
            for hot in (16, 4, 1):
                share = np.full(num_experts, (1 - percent / 100) / (num_experts - hot))
                share[:hot] = percent / 100 / hot
                scenarios[f"{percent}% into {hot}"] = share
        for name, share in scenarios.items():
            loads = rng.multinomial(rows, share, size=(steps, 1))
            found.append(Workload(model, name, loads, 8))
    return found


def zipf(steps: int, seed: int) -> list[Workload]:
    """Popularity by Zipf's law, experts placed at random.

    "drifting": the logarithm of every popularity takes a random step of standard deviation 0.5
    before each step; "new": another random placement at each step.
    """
    rng = np.random.default_rng(seed)
    found = []
    for num_devices, num_experts in ((8, 128), (32, 256), (64, 256)):
        for exponent in (0.5, 1.0, 1.5):
            for how in ("still", "drifting", "new"):
                share = rng.permutation(np.arange(1, num_experts + 1) ** -exponent)
                loads = []
                for _ in range(steps):
                    loads.append(rng.multinomial(num_devices * 131_072, share / share.sum()))
                    if how == "drifting":
                        share = share * np.exp(0.5 * rng.standard_normal(num_experts))
                    elif how == "new":
                        share = rng.permutation(share)
                group = f"Zipf, N={num_experts}, P={num_devices}"
                stacked = np.asarray(loads)[:, None]
                found.append(Workload(group, f"{exponent} {how}", stacked, num_devices))
    return found


def recorded(path: pathlib.Path, num_devices: int, phases: int = 1) -> list[Workload]:
    """A routing trace in so many phases of about the same length, each with all steps before it.

    Raises ValueError where the trace, the number of devices or of phases does not fit.
    """
    loads = _of_run(path) if path.is_dir() else _of_file(path)
    if loads.ndim != 3 or not np.issubdtype(loads.dtype, np.integer) or 0 in loads.shape:
        raise ValueError(
            f"'loads' in {path} must be integers [steps, layers, experts]; it is "
            f"{loads.dtype}{list(loads.shape)}"
        )
    if loads.shape[2] % num_devices:
        raise ValueError(
            f"{path} has {loads.shape[2]} experts, not a multiple of {num_devices} devices; "
            "choose another --num-devices"
        )
    if not 1 <= phases <= max(len(loads) // 2, 1):
        raise ValueError(
            f"{path} has {len(loads)} steps, too few for {phases} phases; choose another --phases"
        )
    group = f"trace, N={loads.shape[2]}, P={num_devices}"
    found = []
    for part in np.array_split(np.arange(len(loads)), phases):
        history, end = max(part[0], 1), part[-1] + 1
        name = path.stem if phases == 1 else f"steps {history + 1} to {end}"
        found.append(Workload(group, name, loads[:end].astype(np.int64), num_devices, history))
    return found


def _of_file(path: pathlib.Path) -> np.ndarray:
    with np.load(path) as arrays:
        if "loads" not in arrays:
            raise ValueError(f"{path} has no array 'loads'; it has {', '.join(arrays.files)}")
        return arrays["loads"]


def _of_run(path: pathlib.Path) -> np.ndarray:
    """The logged shares of a run, of as many choices as its steps make."""
    found = build_history(read_metrics(path / "metrics.jsonl"))
    choices = found.run["tokens_per_step"] * found.run["k"]
    return np.rint(found.load * choices).astype(np.int64)
