"""Training speed of a small OLMoE on this machine, moejax and transformers in turn.

    python tools/bench_train.py                       moejax alone
    python tools/bench_train.py --peer-python PY      and transformers, run by the interpreter PY
                                                      (which needs torch and transformers)

Both train the same model from the same weights on the same batches: D 256, 4 layers, 4 heads, 16
experts of width 256, top-4, vocabulary 512, 8 sequences of 256 tokens, AdamW. The first losses
are compared (they must agree to 1e-4), so that the two really compute the same thing with the same
routing. Each side is a process of its own; they take turns, and the medians over turns are
printed with their ratio and the share of this machine's matmul peak, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SHAPE = {
    "d_model": 256,
    "num_layers": 4,
    "num_heads": 4,
    "num_experts": 16,
    "d_ff": 256,
    "k": 4,
    "vocab_size": 512,
    "batch_size": 8,
    "length": 256,
}
LEARNING_RATE = 1e-4
AUX_WEIGHT = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--peer-python", help="interpreter with torch and transformers")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps per turn")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=["moejax", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _serve(args)
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        workers = {"moejax": _Worker(sys.executable, "moejax", weights, args.dtype)}
        if args.peer_python:
            workers["transformers"] = _Worker(args.peer_python, "transformers", weights, args.dtype)
        figures = _measure(workers, args.turns, args.steps)
    _report(figures, args)
    return 0


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def _measure(workers: dict[str, _Worker], turns: int, steps: int) -> dict:
    tokens = SHAPE["batch_size"] * SHAPE["length"]
    first = {name: worker.ask("step") for name, worker in workers.items()}
    if len({round(f["loss"], 3) for f in first.values()}) > 1:
        losses = {name: f["loss"] for name, f in first.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
            raise SystemExit(f"the two sides do not compute the same loss: {losses}")
    rates: dict[str, list[float]] = {name: [] for name in workers}
    peaks = []
    for _ in range(turns):
        for name, worker in workers.items():
            rates[name].append(tokens * steps / worker.ask(f"run {steps}")["seconds"])
        peaks.append(workers["moejax"].ask("peak")["flops"])
    about = {name: worker.ask("about") for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    return {"rates": rates, "peaks": peaks, "about": about, "first": first}


def _report(figures: dict, args: argparse.Namespace) -> None:
    rates = {name: statistics.median(values) for name, values in figures["rates"].items()}
    about = figures["about"]["moejax"]
    peak = statistics.median(figures["peaks"])
    share = rates["moejax"] * about["flops_per_token"] / peak
    print(f"small OLMoE, {args.dtype}, {about['params']:,} parameters, 8 x 256 tokens a step")
    for name, values in figures["rates"].items():
        print(
            f"  {name:13} {rates[name]:7,.0f} tokens/s   (median of {len(values)}, "
            f"{min(values):,.0f} to {max(values):,.0f})   {figures['about'][name]['versions']}"
        )
    print(f"  share of the f32 matmul peak of {peak / 1e9:.0f} GFLOP/s: {share:.0%}")
    if "transformers" in rates:
        pairs = zip(figures["rates"]["moejax"], figures["rates"]["transformers"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"  moejax / transformers, median of pairs: {ratio:.2f}")
        figures["ratio"] = ratio
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures | {"median": rates, "peak_share": share}, file, indent=1)


class _Worker:
    """A process that trains when asked, line by line."""

    def __init__(self, python: str, name: str, weights: str, dtype: str):
        command = [python, os.path.abspath(__file__), "--worker", name, "--weights", weights]
        self._process = subprocess.Popen(
            [*command, "--dtype", dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("ready")

    def ask(self, request: str) -> dict:
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _serve(args: argparse.Namespace) -> int:
    # Answers go to the real stdout; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = {"moejax": _Moejax, "transformers": _Transformers}[args.worker](args)
    for line in sys.stdin:
        request, *rest = line.split()
        answers.write(json.dumps(getattr(side, request)(*map(int, rest))) + "\n")
        answers.flush()
    return 0


def _batch(index: int) -> np.ndarray:
    shape = (SHAPE["batch_size"], SHAPE["length"] + 1)
    return np.random.default_rng(index).integers(0, SHAPE["vocab_size"], shape, dtype=np.int32)


class _Side:
    """Counts steps and times them; a side supplies `one(tokens [B, S + 1]) -> loss`."""

    num_steps = 0

    def ready(self) -> dict:
        return {}

    def step(self) -> dict:
        self.num_steps += 1
        return {"loss": float(self.one(_batch(self.num_steps)))}

    def run(self, steps: int) -> dict:
        start = time.perf_counter()
        for _ in range(steps):
            self.num_steps += 1
            loss = self.one(_batch(self.num_steps))
        float(loss)  # waits for the last step
        return {"seconds": time.perf_counter() - start}


class _Moejax(_Side):
    def __init__(self, args: argparse.Namespace):
        import jax

        from moejax.models.flops import size
        from moejax.objectives.lm import NextToken
        from moejax.optim.guard import Guard
        from moejax.optim.optimizer import AdamW
        from moejax.optim.schedule import WSD
        from moejax.train.state import init_state
        from moejax.train.step import make_train_step

        model = _olmoe(args.dtype)
        shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
        schedule = WSD(peak=LEARNING_RATE, warmup_steps=0, decay_fraction=0.0)
        optimizer = AdamW(schedule=schedule).build(shapes, 10**6)
        token_bytes = jax.numpy.ones((SHAPE["vocab_size"],), jax.numpy.int32)
        objective, guard = NextToken(), Guard()
        self._step = jax.jit(
            make_train_step(
                model, objective, optimizer, guard, num_microbatches=1, token_bytes=token_bytes
            ),
            donate_argnums=0,
        )
        self._state = jax.jit(lambda: init_state(model, optimizer, guard, 0))()
        self._size = size(model, SHAPE["length"])
        _save_weights(args.weights, self._state.params)

    def one(self, tokens: np.ndarray):
        from moejax.types import Batch

        batch = Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            loss_mask=np.ones_like(tokens[:, 1:], bool),
            segment_ids=np.ones_like(tokens[:, 1:]),
            positions=np.broadcast_to(
                np.arange(SHAPE["length"], dtype=np.int32), tokens[:, 1:].shape
            ),
        )
        self._state, metrics = self._step(self._state, batch)
        total, count = metrics["terms"]["lm"]
        return total / count

    def peak(self) -> dict:
        from moejax.train.peak import measure_matmul

        return {"flops": measure_matmul()}

    def about(self) -> dict:
        import jax

        return {
            "versions": f"jax {jax.__version__}",
            "params": self._size.params,
            "flops_per_token": self._size.train_flops_per_token,
        }


def _olmoe(dtype: str):
    from moejax.attention.full import FullAttention
    from moejax.balance.load_balance import TwoPassLoadBalance
    from moejax.experts.glu import GLU
    from moejax.layers.norm import RMSNorm
    from moejax.layers.rope import Rope
    from moejax.models.block import Block
    from moejax.models.moe import MoE
    from moejax.models.transformer import Transformer
    from moejax.routers.topk import TopK
    from moejax.transport.local import Local

    heads = SHAPE["num_heads"]
    attention = FullAttention(
        num_heads=heads,
        num_kv_heads=heads,
        rope=Rope(theta=10_000.0),
        qk_norm=RMSNorm(epsilon=1e-5, num_axes=2),
        query_blocks=4,
    )
    ffn = MoE(
        num_experts=SHAPE["num_experts"],
        router=TopK(k=SHAPE["k"], normalise="before"),
        experts=GLU(d_ff=SHAPE["d_ff"]),
        transport=Local(),
        balance=(TwoPassLoadBalance(weight=AUX_WEIGHT),),
    )
    return Transformer(
        num_layers=SHAPE["num_layers"],
        d_model=SHAPE["d_model"],
        block=Block(attention=attention, ffn=ffn, norm=RMSNorm(epsilon=1e-5)),
        vocab_size=SHAPE["vocab_size"],
        dtype=dtype,
        unroll=SHAPE["num_layers"],
    )


def _save_weights(path: str, params) -> None:
    """moejax's initial weights under Hugging Face's names for OLMoE, torch's orientation."""
    layers, out = params["layers_0"], {}
    attention, ffn = layers["attention"], layers["ffn"]
    for i in range(SHAPE["num_layers"]):
        prefix = f"model.layers.{i}."
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            out[f"{prefix}self_attn.{theirs}_proj.weight"] = attention[ours]["kernel"][i].T
        out[prefix + "self_attn.q_norm.weight"] = attention["query_norm"]["scale"][i]
        out[prefix + "self_attn.k_norm.weight"] = attention["key_norm"]["scale"][i]
        out[prefix + "input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        out[prefix + "post_attention_layernorm.weight"] = layers["ffn_norm"]["scale"][i]
        out[prefix + "mlp.gate.weight"] = ffn["router"]["kernel"][i].T
        gate, up = ffn["experts"]["gate"][i], ffn["experts"]["up"][i]  # [E, D, F]
        both = np.concatenate([np.asarray(gate), np.asarray(up)], axis=-1)
        out[prefix + "mlp.experts.gate_up_proj"] = both.transpose(0, 2, 1)
        out[prefix + "mlp.experts.down_proj"] = ffn["experts"]["down"][i].transpose(0, 2, 1)
    out["model.embed_tokens.weight"] = params["embed"]["embedding"]
    out["model.norm.weight"] = params["final_norm"]["scale"]
    out["lm_head.weight"] = params["head"]["kernel"].T
    np.savez(path, **{name: np.asarray(value, np.float32) for name, value in out.items()})


class _Transformers(_Side):
    def __init__(self, args: argparse.Namespace):
        import torch
        import transformers

        config = transformers.OlmoeConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["d_model"],
            intermediate_size=SHAPE["d_ff"],
            num_hidden_layers=SHAPE["num_layers"],
            num_attention_heads=SHAPE["num_heads"],
            num_key_value_heads=SHAPE["num_heads"],
            num_experts=SHAPE["num_experts"],
            num_experts_per_tok=SHAPE["k"],
            norm_topk_prob=False,
            output_router_logits=True,
            router_aux_loss_coef=AUX_WEIGHT / SHAPE["k"],  # its loss is k times Switch's
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self._model = transformers.OlmoeForCausalLM(config)
        state = {name: torch.tensor(value) for name, value in np.load(args.weights).items()}
        missing, unexpected = self._model.load_state_dict(state, strict=False)
        if unexpected or [name for name in missing if "rotary" not in name]:
            raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
        self._model.to(getattr(torch, args.dtype)).train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
        )

    def one(self, tokens: np.ndarray):
        import torch

        ids, targets = torch.tensor(tokens[:, :-1]).long(), torch.tensor(tokens[:, 1:]).long()
        out = self._model(input_ids=ids)
        logits = out.logits.float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
        (loss + AUX_WEIGHT / SHAPE["k"] * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def about(self) -> dict:
        import torch
        import transformers

        return {"versions": f"transformers {transformers.__version__}, torch {torch.__version__}"}


if __name__ == "__main__":
    sys.exit(main())
