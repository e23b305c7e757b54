"""Published DeepSeek files become the published models, and what is special about them is kept."""

import json
import re

import fiddle as fdl
import numpy as np
import pytest

from moejax.balance.loss_free import LossFreeBias
from moejax.errors import UserError
from moejax.interop import hf
from moejax.layers.rope import LinearScaling, Rope, YarnScaling
from moejax.models.flops import size
from tests.interop.tiny_checkpoints import (
    MODELS,
    edit_tensors,
    tensors,
    variables,
    written,
)

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
V3 = {  # deepseek-ai/DeepSeek-V3
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
V2_LITE = V3 | {  # deepseek-ai/DeepSeek-V2-Lite
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
V2 = V2_LITE | {  # deepseek-ai/DeepSeek-V2, where it differs
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}


def test_the_published_v3(config_of, caplog):
    model = fdl.build(config_of(V3))
    assert not caplog.records
    attention, ffn = model.block.attention, model.block.ffn
    assert (attention.num_heads, attention.q_lora_rank, attention.kv_lora_rank) == (128, 1536, 512)
    assert (attention.nope_head_dim, attention.rope_head_dim, attention.v_head_dim) == (
        128,
        64,
        128,
    )
    scaling = YarnScaling(factor=40.0, original_context=4096, mscale=1.0, mscale_all_dim=1.0)
    assert attention.rope == Rope(theta=10_000.0, scaling=scaling)
    assert attention.rope.scaling.amplitude() == 1.0
    assert attention._scale() == pytest.approx(0.1352337788608801)  # 192^-0.5 (0.1 ln 40 + 1)^2
    router = ffn.router
    assert (router.k, router.score, router.normalise, router.scale) == (8, "sigmoid", "after", 2.5)
    assert (router.num_groups, router.num_groups_kept, router.group_score) == (8, 4, "top2")
    assert (ffn.num_experts, ffn.experts.d_ff, ffn.shared.d_ff) == (256, 2048, 2048)
    assert ffn.balance == (LossFreeBias(rate=0.0),)  # published weights are kept as they are
    assert (model.first_k_dense, model.dense_ffn.d_ff) == (3, 18432)
    got = size(model, 4096)
    assert (round(got.params / 1e9), round(got.active_params / 1e9, 1)) == (671, 37.6)


def test_the_published_v2_lite(config_of, caplog):
    model = fdl.build(config_of(V2_LITE))
    assert not caplog.records
    attention, router = model.block.attention, model.block.ffn.router
    assert (attention.num_heads, attention.q_lora_rank, attention.kv_lora_rank) == (16, None, 512)
    assert (router.k, router.score, router.normalise, router.scale) == (6, "softmax", "before", 1.0)
    assert (router.num_groups, router.num_groups_kept) == (1, 1)
    assert model.block.ffn.shared.d_ff == 2 * 1408
    assert (model.first_k_dense, model.dense_ffn.d_ff) == (1, 10944)
    assert round(size(model, 4096).params / 1e9, 1) == 15.7


def test_the_published_v2_chooses_among_the_best_groups(config_of):
    model = fdl.build(config_of(V2))
    router = model.block.ffn.router
    assert (router.num_groups, router.num_groups_kept, router.group_score) == (8, 3, "max")
    assert router.scale == 16.0
    assert round(size(model, 4096).params / 1e9) == 236
    greedy = fdl.build(config_of(V2, topk_method="greedy")).block.ffn.router
    assert greedy.num_groups == 1  # transformers does not read the groups then


@pytest.mark.parametrize(
    "values, changes, text",
    [
        (V3, {"quantization_config": FP8}, "weights quantised by the method 'fp8' cannot be read"),
        (V3, {"kv_lora_rank": ...}, "lacks kv_lora_rank"),
        (V3, {"q_lora_rank": ...}, "lacks q_lora_rank"),
        (V3, {"n_group": None}, "lacks n_group"),
        (V3, {"num_key_value_heads": 8}, "num_key_value_heads=8 is not supported, only num_att"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (V3, {"topk_method": "greedy"}, "topk_method='greedy' is not supported, only 'noaux_tc'"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (V3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1"),
        (
            V3,
            {"rope_scaling": LINEAR | {"mscale_all_dim": 1.0}},
            "mscale_all_dim=1.0 is not supported with this rope_type, only with 'yarn'",
        ),
        (
            V2,
            {"rope_scaling": None, "rope_parameters": LINEAR | {"mscale_all_dim": 0.7}},
            "mscale_all_dim=0.7 is not supported with this rope_type",
        ),
        (V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
        (V2, {"topk_group": None}, "lacks topk_group"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        (V2, {"mlp_bias": True}, "mlp_bias=True is not supported"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(config_of, values, changes, text, tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/config.json.*{text}") as error:
        config_of(values, **changes)
    assert "\n" not in str(error.value)


def test_scaling_rules_that_leave_the_logits_alone(config_of):
    """transformers reads `mscale_all_dim` with every rule, and without a rule not at all."""
    for stated in (LINEAR, LINEAR | {"mscale_all_dim": 0}):
        rope = fdl.build(config_of(V3, rope_scaling=stated)).block.attention.rope
        assert rope == Rope(theta=10_000.0, scaling=LinearScaling(factor=4.0))
    stated = {"rope_type": "default", "mscale_all_dim": 1.0}
    assert fdl.build(config_of(V3, rope_scaling=stated)).block.attention.rope == Rope()


@pytest.mark.parametrize(
    "name, leaf, tensor, kept",
    [
        ("deepseek_v2", "query/kernel", "q_proj.weight", 6),
        ("deepseek_v2", "kv_down/kernel", "kv_a_proj_with_mqa.weight", 10),
        ("deepseek_v2", "kv_down/bias", "kv_a_proj_with_mqa.bias", 10),
        ("deepseek_v3", "query_up/kernel", "q_b_proj.weight", 6),
        ("deepseek_v3", "kv_down/kernel", "kv_a_proj_with_mqa.weight", 10),
    ],
)
def test_rotated_outputs_are_pairs_in_the_file_and_halves_here(name, leaf, tensor, kept, tmp_path):
    params = variables(name)["params"]["layers_1"]["attention"]
    module, kind = leaf.split("/")
    ours = params[module][kind][0].T
    stored = tensors(written(name, tmp_path / "hf"))[f"model.layers.1.self_attn.{tensor}"]
    assert stored.shape == ours.shape
    for start in range(0, len(ours), kept + 8):
        head, theirs = (x[start : start + kept + 8] for x in (ours, stored))
        np.testing.assert_array_equal(theirs[:kept], head[:kept])
        np.testing.assert_array_equal(theirs[kept::2], head[kept : kept + 4])
        np.testing.assert_array_equal(theirs[kept + 1 :: 2], head[kept + 4 :])


def test_the_layer_that_predicts_further_tokens_is_left_out_and_said_to_be(tmp_path, caplog):
    directory = written("deepseek_v3", tmp_path / "hf")
    values = json.loads((directory / "config.json").read_text())
    assert values["num_nextn_predict_layers"] == 0  # what was written has none
    assert values["rope_interleave"] is True
    edit_tensors(
        directory, lambda s: s.update({"model.layers.2.eh_proj.weight": np.ones((2, 2), "f4")})
    )
    hf.load(directory)
    assert "not loaded, as transformers does not either: 1 tensors such as" in caplog.text
    edit_tensors(directory, lambda s: s.update({"model.layers.3.x": np.ones((2, 2), "f4")}))
    with pytest.raises(UserError, match=r"model.layers.3.x, which the model .* does not have"):
        hf.load(directory)


def test_queries_without_a_latent_are_said_to_have_none(tmp_path):
    """A file without the key would mean 1536 to transformers."""
    directory = written("deepseek_v2", tmp_path / "hf")
    values = json.loads((directory / "config.json").read_text())
    assert values["q_lora_rank"] is None
    assert "model.layers.0.self_attn.q_proj.weight" in tensors(directory)
    assert hf.load(directory)[0] == MODELS["deepseek_v2"]
