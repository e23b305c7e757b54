"""The two sides that `bench_train.py` compares: each trains the same small OLMoE when asked."""

from __future__ import annotations

import argparse
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


class Moejax(_Side):
    """moejax; writes its initial weights for the other side."""

    def __init__(self, args: argparse.Namespace):
        import jax

        from moejax.models.flops import size
        from moejax.objectives.lm import NextToken
        from moejax.optim.guard import Guard
        from moejax.optim.optimizer import AdamW
        from moejax.optim.schedule import WSD
        from moejax.train.state import init_state
        from moejax.train.step import jit_step, make_train_step

        model = _olmoe(args.dtype)
        shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
        schedule = WSD(peak=LEARNING_RATE, warmup_steps=0, decay_fraction=0.0)
        optimizer = AdamW(schedule=schedule).build(shapes, 10**6)
        token_bytes = jax.numpy.ones((SHAPE["vocab_size"],), jax.numpy.int32)
        objective, guard = NextToken(), Guard()
        step = make_train_step(
            model, objective, optimizer, guard, num_microbatches=1, token_bytes=token_bytes
        )
        self._step = jit_step(step)
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
        boundaries=tuple(range(1, SHAPE["num_layers"])),
    )


def _save_weights(path: str, params) -> None:
    """moejax's initial weights under Hugging Face's names for OLMoE, torch's orientation."""
    import jax

    out = {}
    for i in range(SHAPE["num_layers"]):
        layer = jax.tree.map(lambda x: np.asarray(x[0]), params[f"layers_{i}"])
        attention, ffn = layer["attention"], layer["ffn"]
        prefix = f"model.layers.{i}."
        for ours, theirs in {"query": "q", "key": "k", "value": "v", "output": "o"}.items():
            out[f"{prefix}self_attn.{theirs}_proj.weight"] = attention[ours]["kernel"].T
        out[prefix + "self_attn.q_norm.weight"] = attention["query_norm"]["scale"]
        out[prefix + "self_attn.k_norm.weight"] = attention["key_norm"]["scale"]
        out[prefix + "input_layernorm.weight"] = layer["attention_norm"]["scale"]
        out[prefix + "post_attention_layernorm.weight"] = layer["ffn_norm"]["scale"]
        out[prefix + "mlp.gate.weight"] = ffn["router"]["kernel"].T
        gate, up = ffn["experts"]["gate"], ffn["experts"]["up"]  # [E, D, F]
        both = np.concatenate([gate, up], axis=-1)
        out[prefix + "mlp.experts.gate_up_proj"] = both.transpose(0, 2, 1)
        out[prefix + "mlp.experts.down_proj"] = ffn["experts"]["down"].transpose(0, 2, 1)
    out["model.embed_tokens.weight"] = params["embed"]["embedding"]
    out["model.norm.weight"] = params["final_norm"]["scale"]
    out["lm_head.weight"] = params["head"]["kernel"].T
    np.savez(path, **{name: np.asarray(value, np.float32) for name, value in out.items()})


class Transformers(_Side):
    """transformers' OlmoeForCausalLM on torch, from those weights."""

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
