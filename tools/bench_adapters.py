"""Time and memory of training mixtures of LoRA, against one LoRA on the same projections.

    python tools/bench_adapters.py --json a.json
    python tools/bench_adapters.py --break-even

A dense model of two layers, of Llama's proportions, with every projection adapted; rank 16, and
mixtures of eight. One compiled step for each method; all alternate within every round.
`activations` is what a token in a layer adds to the compiler's temporaries (`memory_analysis` of
the step with two and six layers, at one and at two times the tokens) beyond what it adds with one
LoRA, as a multiple of adapters x rank per adapted projection. Temporaries as such also hold
gradients and updates, which grow with the adapters and not with the tokens.

With --break-even it times one mixture beside a projection (forward and all gradients), computed
over all adapters and on sorted rows, for more and more adapters: the figure in
`layers/mixing/ragged.py`.
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

import jax
import jax.numpy as jnp
import numpy as np

from moejax.adapters.comol import CoMoL, CoreBank
from moejax.adapters.dynmole import DynMoLE
from moejax.adapters.lora import LoRA
from moejax.adapters.mixed import MixedLinear
from moejax.attention.full import FullAttention
from moejax.experts.dense import DenseGLU
from moejax.experts.mixlora import MixLoRA
from moejax.layers.mixing.bank import LoRABank
from moejax.layers.mixing.ragged import ragged_delta
from moejax.models.adapter import Adapter
from moejax.models.block import Block
from moejax.models.transformer import Transformer
from moejax.models.variables import parameters
from moejax.objectives.lm import NextToken
from moejax.optim import freeze
from moejax.optim.guard import Guard
from moejax.optim.optimizer import AdamW
from moejax.optim.schedule import WarmupCosine
from moejax.train.manifest import versions
from moejax.train.state import init_state
from moejax.train.step import jit_step, make_train_step
from moejax.types import Batch

NUM_LAYERS, VOCABULARY, RANK, NUM_ADAPTERS, CHOSEN = 2, 512, 16, 8, 2
TRAINABLE = ("lora/*",)
PROJECTIONS = 7  # adapted in every layer
BANK = LoRABank(num_adapters=NUM_ADAPTERS, rank=RANK)
METHODS = {
    "LoRA": Adapter(targets="all-linear", linear=LoRA(rank=RANK)),
    "top-2 of 8": Adapter(targets="all-linear", linear=MixedLinear(bank=BANK)),
    "DynMoLE": Adapter(targets="all-linear", linear=DynMoLE(bank=BANK)),
    "CoMoL": Adapter(targets="all-linear", linear=CoMoL(bank=CoreBank(num_adapters=8))),
    "MixLoRA": Adapter(targets="all-linear", linear=LoRA(rank=RANK), mlp=MixLoRA(bank=BANK)),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--break-even", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    rows = _break_even(args) if args.break_even else _methods(args)
    if args.json:
        report = {"versions": versions(), "arguments": vars(args) | {"json": None}, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = {name: _Run(adapter, args) for name, adapter in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):
        for name, run in runs.items():
            times[name].append(run.step())
    one, rows = runs["LoRA"], []
    unit = NUM_ADAPTERS * RANK * 4 * PROJECTIONS  # bytes per token and layer
    for name, run in runs.items():
        seconds = times[name][1:]
        ratios = [a / b for a, b in zip(seconds, times["LoRA"][1:], strict=True)]
        rows.append(
            {
                "method": name,
                "seconds": seconds,
                "ratio": statistics.median(ratios),
                "trained": run.num_trained,
                "state_bytes": run.state_bytes,
                "temp_bytes": run.temp_bytes,
                "bytes_per_token": run.bytes_per_token,
                "activations": (run.bytes_per_token - one.bytes_per_token) / unit,
            }
        )
        print(
            f"{name:11} {statistics.median(seconds):7.3f} s  {rows[-1]['ratio']:5.2f} x LoRA  "
            f"{run.num_trained:10,} trained  {run.temp_bytes / 1e6:8.1f} MB temporaries  "
            f"{rows[-1]['activations']:5.2f} x E r per token and projection",
            flush=True,
        )
    return rows


class _Run:
    """A compiled step and its state."""

    def __init__(self, adapter: Adapter, args: argparse.Namespace):
        per_token = [
            (large.temp_bytes - small.temp_bytes) / args.tokens
            for small, large in (
                [_Step(adapter, args.width, layers, n * args.tokens) for n in (1, 2)]
                for layers in (NUM_LAYERS, 3 * NUM_LAYERS)
            )
        ]
        self.bytes_per_token = (per_token[1] - per_token[0]) / (2 * NUM_LAYERS)
        step = _Step(adapter, args.width, NUM_LAYERS, args.tokens)
        self.temp_bytes, self._step, self._batch = step.temp_bytes, step.run, step.batch
        self._state = jax.jit(step.fresh)()
        self.num_trained = sum(x.size for x in jax.tree.leaves(self._state.params))
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self._state.opt_state))

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - started


class _Step:
    """A step compiled for a number of layers and tokens."""

    def __init__(self, adapter: Adapter, width: int, num_layers: int, num_tokens: int):
        heads = width // 128
        attention = FullAttention(num_heads=heads, num_kv_heads=heads)
        model = Transformer(
            num_layers=num_layers,
            d_model=width,
            block=Block(attention=attention, ffn=DenseGLU(d_ff=width * 11 // 4)),
            vocab_size=VOCABULARY,
            adapter=adapter,
        )
        self.batch = _batch(num_tokens)
        adamw = AdamW(schedule=WarmupCosine(peak=1e-4, warmup_steps=1))
        shapes = parameters(jax.eval_shape(model.init, jax.random.key(0)))
        optimizer = adamw.build(freeze.split(shapes, TRAINABLE)[0], 1000)
        step = make_train_step(
            model,
            NextToken(),
            optimizer,
            Guard(),
            num_microbatches=1,
            token_bytes=jnp.ones(VOCABULARY, jnp.int32),
        )
        self.fresh = lambda: init_state(model, optimizer, Guard(), 0, trainable=TRAINABLE)
        self.run = jit_step(step).lower(jax.eval_shape(self.fresh), self.batch).compile()
        self.temp_bytes = self.run.memory_analysis().temp_size_in_bytes


def _batch(num_tokens: int) -> Batch:
    """Rows of 512 tokens: so attention costs each token the same."""
    tokens = jax.random.randint(jax.random.key(0), (num_tokens // 512, 512), 0, VOCABULARY)
    ones = jnp.ones_like(tokens)
    return Batch(
        tokens=tokens,
        targets=jnp.roll(tokens, -1, axis=1),
        loss_mask=ones > 0,
        segment_ids=ones,
        positions=jnp.broadcast_to(jnp.arange(512), tokens.shape),
    )


def _break_even(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for num_adapters in (8, 16, 24, 32, 48, 64, 128):
        x, a, b, chosen, weights = _operands(args, num_adapters)
        calls = {}
        for name, function in (("all", _over_all), ("sorted", ragged_delta)):
            loss = lambda x, a, b, w, f=function, c=chosen: jnp.sum(jnp.sin(f(x, a, b, c, w)))
            grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
            jax.block_until_ready(grad(x, a, b, weights))
            calls[name] = grad
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                started = time.perf_counter()
                jax.block_until_ready(call(x, a, b, weights))
                times[name].append(time.perf_counter() - started)
        ratio = statistics.median(s / t for s, t in zip(times["all"], times["sorted"], strict=True))
        rows.append({"num_adapters": num_adapters, "seconds": times, "ratio": ratio})
        print(
            f"{num_adapters:4} adapters: all takes {ratio:5.2f} times as long as sorted", flush=True
        )
    return rows


def _operands(args: argparse.Namespace, num_adapters: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    chosen = np.stack([rng.permutation(num_adapters)[:CHOSEN] for _ in range(args.tokens)])
    return (
        normal(args.tokens, args.width),
        normal(num_adapters, args.width, RANK),
        normal(num_adapters, RANK, args.width),
        jnp.asarray(chosen, jnp.int32),
        jnp.full((args.tokens, CHOSEN), 1 / CHOSEN),
    )


def _over_all(x: Any, a: Any, b: Any, chosen: Any, weights: Any) -> Any:
    """As `LoRABank` computes it."""
    num_adapters = a.shape[0]
    gate = (jax.nn.one_hot(chosen, num_adapters) * weights[..., None]).sum(axis=1)
    inner = (x @ a.transpose(1, 0, 2).reshape(x.shape[1], -1)).reshape(len(x), num_adapters, -1)
    return (inner * gate[..., None]).reshape(len(x), -1) @ b.reshape(-1, b.shape[-1])


if __name__ == "__main__":
    sys.exit(main())
