"""The tiny models of transformers of which `update_golden.py` stores logits."""

from __future__ import annotations

import transformers

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}

_TINY = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
_DENSE = {k: v for k, v in _TINY.items() if k != "num_experts_per_tok"} | {"intermediate_size": 12}
# transformers 5 takes the short factors for rows of any length, so only short rows are compared.
PHI_ROPE = {"rope_type": "longrope", "rope_theta": 10_000.0}
PHI_ROPE |= {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
PHI_ROPE |= {"short_mscale": 1.125, "long_mscale": 1.25, "original_max_position_embeddings": 16}
_NARROW = {"intermediate_size": 12, "moe_intermediate_size": 8}
_LATENT = {key: value for key, value in _TINY.items() if key != "head_dim"} | _NARROW
_LATENT |= {"num_key_value_heads": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
_LATENT |= {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}


def model_configs() -> dict[str, transformers.PretrainedConfig]:
    """Families that between them use every option of the model."""
    return {
        "mixtral": transformers.MixtralConfig(
            **_TINY, intermediate_size=8, num_local_experts=4, sliding_window=5
        ),
        "olmoe": transformers.OlmoeConfig(
            **{k: v for k, v in _TINY.items() if k != "head_dim"} | {"num_key_value_heads": 4},
            intermediate_size=8,
            num_experts=4,
        ),
        "qwen2_moe": transformers.Qwen2MoeConfig(
            **_TINY, **_NARROW, shared_expert_intermediate_size=12, num_experts=4
        ),
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **_TINY, **_NARROW, num_experts=4, norm_topk_prob=True, decoder_sparse_step=2
        ),
        "glm4_moe": transformers.Glm4MoeConfig(
            **_TINY,
            **_NARROW,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            use_qk_norm=True,
            routed_scaling_factor=2.5,
        ),
        "gpt_oss": transformers.GptOssConfig(
            **_TINY,
            intermediate_size=8,
            num_local_experts=4,
            sliding_window=5,
            eos_token_id=None,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        ),
        "deepseek_v2": transformers.DeepseekV2Config(
            **_LATENT,
            q_lora_rank=None,
            n_routed_experts=8,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=4.0,
            attention_bias=True,
        ),
        "deepseek_v3": transformers.DeepseekV3Config(
            **_LATENT | {"max_position_embeddings": 640},
            q_lora_rank=12,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_mtp_layers=0,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 40.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 16,
            },
        ),
        "llama": transformers.LlamaConfig(
            **{k: v for k, v in _DENSE.items() if k != "head_dim"},
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16},
        ),
        "qwen3": transformers.Qwen3Config(
            **_DENSE, use_sliding_window=True, sliding_window=5, max_window_layers=1
        ),
        "phimoe": transformers.PhimoeConfig(
            **_TINY,
            intermediate_size=8,
            num_local_experts=4,
            sliding_window=5,
            attention_bias=True,
            lm_head_bias=True,
            router_jitter_noise=0.4,
            rope_parameters=PHI_ROPE,
        ),
    }
