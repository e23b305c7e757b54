"""Time and memory of training a part of an OLMoE-shaped model, against training all of it.

    python tools/bench_tuning.py --json a.json

OLMoE's 64 experts, top-8 and 16 layers at a quarter of its widths, in float32. One compiled step of
training for every choice of what trains, and the forward pass alone; all alternate within every
round. `backward` is a step without its forward pass: gradients, optimiser and selection. Gradients
take as much memory as the parameters that train, optimiser state is counted from its arrays, and
temporaries are the compiler's (`memory_analysis`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import fiddle as fdl
import jax
import jax.numpy as jnp

from moejax.balance.unbalanced import Unbalanced
from moejax.interop.architectures import olmoe
from moejax.objectives.lm import NextToken
from moejax.optim import freeze
from moejax.optim.guard import Guard
from moejax.optim.optimizer import AdamW
from moejax.optim.schedule import WarmupCosine
from moejax.train.manifest import versions
from moejax.train.state import init_state
from moejax.train.step import jit_step, make_train_step
from moejax.types import Batch

NUM_LAYERS, VOCABULARY = 16, 4096
CHOICES = {
    "all parameters": ("*",),
    "all routers": ("*/router/*",),
    "routers of the last five layers": (f"layers_{NUM_LAYERS - 5}/*/router/*",),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    model = _model()
    batch = _batch(args.batch_size, args.sequence_length)
    runs = {name: _Run(model, trainable, batch) for name, trainable in CHOICES.items()}
    forward = _forward(model, batch)
    times: dict[str, list[float]] = {name: [] for name in [*runs, "forward"]}
    for _ in range(args.rounds + 1):
        times["forward"].append(forward())
        for name, run in runs.items():
            times[name].append(run.step())
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    report = {"versions": versions(), "seconds": times, "rows": _rows(runs, medians)}
    _print(report["rows"], medians["forward"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _model() -> Any:
    config = olmoe.ARCHITECTURE.template()
    config.num_layers, config.d_model, config.vocab_size = NUM_LAYERS, 512, VOCABULARY
    config.boundaries = (NUM_LAYERS - 5,)
    config.block.attention.num_heads = config.block.attention.num_kv_heads = 4
    config.block.ffn.num_experts, config.block.ffn.router.k = 64, 8
    config.block.ffn.experts.d_ff = 256
    config.block.ffn.balance = (fdl.Config(Unbalanced),)
    return fdl.build(config)


def _batch(batch_size: int, sequence_length: int) -> Batch:
    tokens = jax.random.randint(jax.random.key(0), (batch_size, sequence_length), 0, VOCABULARY)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(sequence_length), tokens.shape)
    return Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=1),
        loss_mask=ones > 0,
        segment_ids=ones,
        positions=positions,
    )


class _Run:
    """A compiled step and its state."""

    def __init__(self, model: Any, trainable: tuple[str, ...], batch: Batch):
        shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
        trained, _ = freeze.split(shapes, trainable)
        schedule = WarmupCosine(peak=1e-4, warmup_steps=1)
        optimizer = AdamW(schedule=schedule).build(trained, 1000)
        step = make_train_step(
            model,
            NextToken(),
            optimizer,
            Guard(),
            num_microbatches=1,
            token_bytes=jnp.ones(VOCABULARY, jnp.int32),
        )
        self._state = jax.jit(
            lambda: init_state(model, optimizer, Guard(), 0, trainable=trainable)
        )()
        self.trainable_bytes = _num_bytes(self._state.params)
        self.optimizer_bytes = _num_bytes(self._state.opt_state)
        self._batch = batch
        self._step = jit_step(step).lower(self._state, batch).compile()
        self.temp_bytes = self._step.memory_analysis().temp_size_in_bytes

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - started


def _forward(model: Any, batch: Batch):
    variables = jax.jit(model.init)(jax.random.key(0))
    token_bytes = jnp.ones(VOCABULARY, jnp.int32)
    loss = jax.jit(lambda v, b: NextToken()(model, v, b, token_bytes=token_bytes).terms)

    def run() -> float:
        started = time.perf_counter()
        jax.block_until_ready(loss(variables, batch))
        return time.perf_counter() - started

    return run


def _num_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _rows(runs: dict[str, _Run], medians: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "trains": name,
            "seconds": medians[name],
            "backward_seconds": medians[name] - medians["forward"],
            "gradient_bytes": run.trainable_bytes,
            "optimizer_bytes": run.optimizer_bytes,
            "temp_bytes": run.temp_bytes,
        }
        for name, run in runs.items()
    ]


def _print(rows: list[dict[str, Any]], forward: float) -> None:
    whole = rows[0]
    print(f"forward alone {forward:.3f} s")
    print(
        f"{'trains':34} step s  backward s  of all  gradient + state MB  of all   temp MB  of all"
    )
    for row in rows:
        held = row["gradient_bytes"] + row["optimizer_bytes"]
        held_by_all = whole["gradient_bytes"] + whole["optimizer_bytes"]
        print(
            f"{row['trains']:34} {row['seconds']:6.3f}  {row['backward_seconds']:10.3f}"
            f"  {row['backward_seconds'] / whole['backward_seconds']:5.0%}"
            f"  {held / 1e6:19.2f}  {held / held_by_all:6.2%}"
            f"  {row['temp_bytes'] / 1e6:8.1f}  {row['temp_bytes'] / whole['temp_bytes']:5.0%}"
        )


if __name__ == "__main__":
    sys.exit(main())
