"""Writes the metrics of a run that never happened, realistic enough to draw and to judge.

Also a script, for `moejax report RUN`: `python tests/analysis/synthetic_run.py RUN [name=value]`.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np


@dataclasses.dataclass(kw_only=True)
class SyntheticRun:
    """A run's shape and what goes wrong in it (layer and expert are indices, -1 is nowhere)."""

    num_records: int = 300
    log_every: int = 10
    num_layers: int = 4
    num_experts: int = 16
    k: int = 4
    tokens_per_step: int = 2048
    first_layer: int = 0
    dead_layer: int = -1
    dead_expert: int = 5
    dead_from: int = 0
    collapse_layer: int = -1
    collapse_from: int = 0
    num_spikes: int = 3
    finished: bool = True
    peak_known: bool = True
    seed: int = 0

    def records(self) -> list[dict]:
        rng = np.random.default_rng(self.seed)
        skew = rng.normal(size=(self.num_layers, self.num_experts))
        spikes = set()
        if self.num_records >= 20:
            first = self.num_records // 5
            spikes = set(rng.integers(first, self.num_records, self.num_spikes).tolist())
        out = [_record("run", 0, 0, self._run_values())]
        skipped = 0
        for i in range(self.num_records):
            step = (i + 1) * self.log_every
            skipped += i in spikes
            values = self._train_values(rng, i, skipped, i in spikes)
            if self.num_layers:
                values |= self._router_values(rng, step, skew)
            out.append(_record("train", step, 3.0 * i, values))
            if (i + 1) % max(1, self.num_records // 8) == 0:
                bits = values["bits_per_byte"] * 1.02
                out.append(
                    _record(
                        "eval",
                        step,
                        3.0 * i + 1,
                        {
                            "eval/loss": _lm_loss(self._progress(i)) * 1.02,
                            "eval/bits_per_byte": bits,
                        },
                    )
                )
        if self.finished:
            out.append(_record("event", step, 3.0 * i + 2, self._finished_values()))
        return out

    def load(self, rng, step: int, skew: np.ndarray) -> np.ndarray:
        """[L, E] over the steps of a record: a lopsided start that evens out, then the trouble."""
        taste = np.exp(skew * (0.12 + 0.9 * np.exp(-step / 150)))
        sick, sick_steps = taste.copy(), np.zeros((self.num_layers, 1), np.int64)
        if self.dead_layer >= 0:
            sick[self.dead_layer, self.dead_expert] = 0.0
            sick_steps[self.dead_layer] = np.clip(step - self.dead_from, 0, self.log_every)
        if self.collapse_layer >= 0:
            row = sick[self.collapse_layer]
            row[np.argsort(row)[: -self.k]] *= 0.01
            sick_steps[self.collapse_layer] = np.clip(step - self.collapse_from, 0, self.log_every)
        well_steps = self.log_every - sick_steps
        counts = rng.binomial(well_steps * self.tokens_per_step, _chosen(taste, self.k))
        counts += rng.binomial(sick_steps * self.tokens_per_step, _chosen(sick, self.k))
        return counts / counts.sum(1, keepdims=True)

    def _progress(self, i: int) -> float:
        return (i + 1) / max(self.num_records, 2)

    def _run_values(self) -> dict:
        return {
            "name": "tiny <synthetic>",
            "config": "configs/tiny.py",
            "num_params": 10_354_176,
            "num_active_params": 4_162_560,
            "moe_layers": [self.first_layer + i for i in range(self.num_layers)],
            "num_experts": self.num_experts if self.num_layers else 0,
            "k": self.k,
            "tokens_per_step": self.tokens_per_step,
            "device": "cpu x 2",
            "versions": {"python": "3.11.2", "jax": "0.10.2", "moejax": "0.1.0"},
            "peak_flops": 1.2e11 if self.peak_known else None,
        }

    def _train_values(self, rng, i: int, skipped: int, spike: bool) -> dict:
        progress = self._progress(i)
        lm = _lm_loss(progress) + rng.normal(0, 0.06) + (4.0 if spike else 0.0)
        speed = 9500 * (0.35 if i == 0 else 1.0) * rng.normal(1, 0.03)
        norm = (0.6 + 2.5 * np.exp(-progress * 12)) * rng.lognormal(0, 0.15)
        warm = min(1.0, progress / 0.05)
        return {
            "loss": lm + 0.013,
            "loss/lm": lm,
            "loss/load_balance": 0.01 * rng.normal(1.05, 0.01),
            "loss/z": 0.003,
            "bits_per_byte": lm / np.log(2) / 3.1,
            "grad_norm": "inf" if spike else norm,
            "update_norm": 0.0 if spike else 0.02 * norm,
            "learning_rate": 2e-3 * warm * (0.55 + 0.45 * np.cos(np.pi * progress)),
            "tokens_per_second": speed,
            "model_flops_per_second": speed * 2.6e7 / 4,
            "peak_share": speed * 2.6e7 / 4 / 1.2e11 if self.peak_known else None,
            "skipped": skipped,
        }

    def _router_values(self, rng, step: int, skew: np.ndarray) -> dict:
        load = self.load(rng, step, skew)
        depth = np.arange(self.num_layers) / max(self.num_layers - 1, 1)
        entropy = 0.55 + 0.4 * np.exp(-step / 400) + 0.1 * depth * (1 - np.exp(-step / 400))
        entropy = np.clip(entropy + rng.normal(0, 0.008, self.num_layers), 0, 1)
        if self.collapse_layer >= 0 and step >= self.collapse_from:
            entropy[self.collapse_layer] *= 0.3
        return {
            "router/load": load.tolist(),
            "router/entropy": entropy.tolist(),
            "router/max_vio": (self.num_experts * load.max(1) - 1).tolist(),
            "router/dead": (load == 0).sum(1).tolist(),
            "router/dropped": [0] * self.num_layers,
        }

    def _finished_values(self) -> dict:
        return {
            "event": "finished",
            "gzip_bits_per_byte": 1.93,
            "xz_bits_per_byte": 1.67,
            "eval/bits_per_byte": _lm_loss(1.0) / np.log(2) / 3.1 * 1.02,
            "sample": "def mean(values):\n    if not values:  # <script>alert(1)</script>\n"
            "        raise ValueError('no values & nothing to do')\n"
            "    return sum(values) / len(values)\n",
        }


def write_run(run_dir: pathlib.Path, records: list[dict]) -> pathlib.Path:
    """Writes `metrics.jsonl` and a config text into `run_dir`, which it returns."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    (run_dir / "config.txt").write_text("model.block.ffn.router.k = 4\nsteps = 3000\n")
    return run_dir


def _record(kind: str, step: int, seconds: float, values: dict) -> dict:
    return {"kind": kind, "step": step, "time": 1.7e9 + seconds, "values": values}


def _chosen(taste: np.ndarray, k: int) -> np.ndarray:
    """The probability that a token chooses each expert; a row sums to k. By bisection."""
    low, high = np.zeros((len(taste), 1)), np.full((len(taste), 1), 1e3)
    for _ in range(32):
        middle = (low + high) / 2
        too_many = (1 - np.exp(-middle * taste)).sum(1, keepdims=True) > k
        low, high = np.where(too_many, low, middle), np.where(too_many, middle, high)
    return 1 - np.exp(-low * taste)


def _lm_loss(progress: float) -> float:
    return 3.6 + 4.7 * np.exp(-progress * 14) + 1.2 * np.exp(-progress * 2.5)


if __name__ == "__main__":
    overrides = dict(item.split("=") for item in sys.argv[2:])
    fake = SyntheticRun(**{name: int(value) for name, value in overrides.items()})
    print(write_run(pathlib.Path(sys.argv[1]), fake.records()))
