"""Writes the fixtures of tests/golden/ from Hugging Face transformers (extra `bench`).

    python tools/update_golden.py

Inverse frequencies of every RoPE scaling rule, the selections and weights of six routers, and the
logits of a tiny random model per architecture with its parameters in moejax's layout. Weights are
stored as integers on a grid, so the fixtures are small and exact. Running it again changes nothing
unless transformers changed; commit what it writes together with what you learnt about why.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import sparsemixer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tools.golden_models import LLAMA3, model_configs
from tools.golden_names import converted

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
GRID = 32  # stored integers of the models are this many times the value
ROUTER_GRID = 4096  # finer, so that no two experts tie

_DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0}
_YARN |= {"original_max_position_embeddings": 4096}
_SHORT, _LONG = [1.0 + i / 16 for i in range(8)], [1.0 + i for i in range(8)]
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "attention_factor": 1.25}
_LONGROPE |= {"short_factor": _SHORT, "long_factor": _LONG}
_LONGROPE |= {"original_max_position_embeddings": 4096}

ROPE = {  # name: (head_dim, parameters as in a checkpoint's config.json)
    "default": (16, _DEFAULT),
    "partial": (16, _DEFAULT | {"partial_rotary_factor": 0.5}),
    "linear": (16, {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
    "llama3": (64, LLAMA3),
    "yarn": (64, _YARN),
    "yarn_not_truncated": (64, _YARN | {"truncate": False}),
    "deepseek_v3": (64, _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}),
    "stated_factor": (64, _YARN | {"factor": 4.0, "attention_factor": 1.25}),
    "gpt_oss": (64, _YARN | {"rope_theta": 150_000.0, "factor": 32.0, "truncate": False}),
    "longrope_4096": (16, _LONGROPE),
    "longrope_4097": (16, _LONGROPE),
}


def rope_goldens() -> dict:
    """{name: parameters, head_dim, inverse frequencies and attention factor}."""
    out = {}
    for name, (head_dim, parameters) in ROPE.items():
        config = transformers.LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=131_072,
            rope_parameters=dict(parameters),
        )
        if parameters["rope_type"] == "default":
            embedding = transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeRotaryEmbedding
            inverse, factor = embedding.compute_default_rope_parameters(config)
        else:
            rule = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
            long = {"seq_len": int(name[-4:])} if parameters is _LONGROPE else {}
            inverse, factor = rule(config, "cpu", **long)
        out[name] = {
            "head_dim": head_dim,
            "parameters": parameters,
            "inverse_frequencies": [float(f"{v:.9g}") for v in inverse.tolist()],
            "attention_factor": factor,
        }
    return out


def _draw(rng, shape, std, *, mean=0.0, grid=GRID, dtype=np.int8) -> np.ndarray:
    """Normal values as integers, `grid` to one."""
    values = np.rint(grid * (mean + std * rng.standard_normal(shape)))
    limits = np.iinfo(dtype)
    return np.clip(values, limits.min, limits.max).astype(dtype)


def router_goldens() -> dict[str, np.ndarray]:
    """{<router>/<x, kernel, bias, correction, dense>}; `dense` is the weight per expert [T, E]."""
    sizes = {"hidden_size": 8, "num_experts_per_tok": 3, "num_attention_heads": 4}
    routers = {
        "mixtral": MixtralTopKRouter(transformers.MixtralConfig(num_local_experts=8, **sizes)),
        "olmoe": OlmoeTopKRouter(transformers.OlmoeConfig(num_experts=8, **sizes)),
        "qwen3_moe": Qwen3MoeTopKRouter(
            transformers.Qwen3MoeConfig(num_experts=8, norm_topk_prob=True, **sizes)
        ),
        "deepseek_v2": DeepseekV2TopkRouter(
            transformers.DeepseekV2Config(
                n_routed_experts=8,
                topk_method="group_limited_greedy",
                n_group=4,
                topk_group=2,
                routed_scaling_factor=16.0,
                **sizes,
            )
        ),
        "deepseek_v3": DeepseekV3TopkRouter(
            transformers.DeepseekV3Config(
                n_routed_experts=8, n_group=4, topk_group=2, routed_scaling_factor=2.5, **sizes
            )
        ),
        "gpt_oss": GptOssTopKRouter(transformers.GptOssConfig(num_local_experts=8, **sizes)),
    }
    out = {}
    for seed, (name, router) in enumerate(routers.items()):
        rng = np.random.default_rng(seed)
        draw = functools.partial(_draw, rng, grid=ROUTER_GRID, dtype=np.int16)
        stored = {"x": draw((24, 8), 1.0), "kernel": draw((8, 8), 0.5)}
        value = lambda key, s=stored: torch.from_numpy(s[key] / np.float32(ROUTER_GRID))
        with torch.no_grad():
            router.weight.copy_(value("kernel").T)
            if hasattr(router, "bias"):
                stored["bias"] = draw((8,), 0.5)
                router.bias.copy_(value("bias"))
            if hasattr(router, "e_score_correction_bias"):
                stored["correction"] = draw((8,), 0.2)
                router.e_score_correction_bias.copy_(value("correction"))
            _, weights, experts = router(value("x"))
        dense = torch.zeros(24, 8).scatter_(1, experts, weights)
        out |= {f"{name}/{key}": value for key, value in (stored | {"dense": dense}).items()}
    return {key: np.asarray(value) for key, value in out.items()}


def sparsemixer_goldens() -> dict[str, np.ndarray]:
    """Phi-3.5-MoE's router on logits [T, E], with and without training, and a gradient."""
    rng = np.random.default_rng(50)
    logits = _draw(rng, (48, 8), 1.0, grid=ROUTER_GRID, dtype=np.int16)
    probe = _draw(rng, (48, 2), 1.0)
    value = lambda: torch.from_numpy(logits / np.float32(ROUTER_GRID)).requires_grad_()
    torch.manual_seed(0)
    out: dict[str, np.ndarray] = {"logits": logits, "probe": probe}
    for name, jitter, training in (
        ("published", 0.01, False),
        ("wide", 0.4, False),
        ("training", 0.4, True),
    ):
        scores = value()
        weights, experts = sparsemixer(scores, jitter_eps=jitter, training=training)
        (weights * torch.from_numpy(probe / np.float32(GRID))).sum().backward()
        found = {"experts": experts, "weights": weights.detach(), "gradient": scores.grad}
        out |= {f"{name}/{key}": array.numpy() for key, array in found.items()}
    return out


def drawn_model(config: transformers.PretrainedConfig, seed: int) -> tuple:
    """(a model of transformers with random weights, these as integers on the grid, tokens)."""
    rng = np.random.default_rng(100 + seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    stored = {}
    for key, value in model.state_dict().items():
        norm = "norm" in key and "bias" not in key
        std = 0.1 if norm else 0.3 if "bias" in key or "sinks" in key else 1 / math.sqrt(16)
        if "embed_tokens" in key:
            std = 1.0
        stored[key] = _draw(rng, tuple(value.shape), std, mean=1.0 if norm else 0.0)
    model.load_state_dict({k: torch.from_numpy(v / np.float32(GRID)) for k, v in stored.items()})
    return model, stored, rng.integers(0, config.vocab_size, (2, 12))


def model_goldens(config: transformers.PretrainedConfig, seed: int) -> dict:
    """Tokens, logits, and parameters by moejax path with the layer's index in front.

    One array holds all parameters, in the order of `layout`: {path: shape}.
    """
    model, stored, tokens = drawn_model(config, seed)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    params = {
        "embed/embedding": stored.pop("model.embed_tokens.weight"),
        "final_norm/scale": stored.pop("model.norm.weight"),
        "head/kernel": stored.pop("lm_head.weight").T,
    }
    for theirs, ours in (("model.norm.bias", "final_norm/bias"), ("lm_head.bias", "head/bias")):
        if theirs in stored:
            params[ours] = stored.pop(theirs)
    for key, value in stored.items():
        _, _, index, path = key.split(".", 3)
        params |= {f"{index}/{p}": v for p, v in converted(path, value, config).items()}
    return {
        "tokens": tokens.astype(np.int32),
        "logits": logits,
        "layout": json.dumps({key: value.shape for key, value in params.items()}),
        "params": np.concatenate([value.ravel() for value in params.values()]),
    }


def main() -> None:
    """Writes every fixture and says how large each is."""
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "rope.json").write_text(json.dumps(rope_goldens(), indent=1) + "\n")
    np.savez_compressed(GOLDEN / "routers.npz", **router_goldens())
    np.savez_compressed(GOLDEN / "sparsemixer.npz", **sparsemixer_goldens())
    for seed, (name, config) in enumerate(model_configs().items()):
        np.savez_compressed(GOLDEN / f"{name}.npz", **model_goldens(config, seed))
    for path in sorted(GOLDEN.iterdir()):
        print(f"{path.name:20} {path.stat().st_size:7} bytes")


if __name__ == "__main__":
    main()
