"""What config.json says becomes a model, in the words of both generations of transformers."""

import re

import fiddle as fdl
import pytest

from moejax.balance.unbalanced import Unbalanced
from moejax.errors import UserError
from moejax.interop import hf
from moejax.layers.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

OLMOE = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}
QWEN3 = OLMOE | {
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "use_sliding_window": False,
    "sliding_window": None,
}
QWEN2 = QWEN3 | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64}
GPT_OSS = OLMOE | {"model_type": "gpt_oss", "head_dim": 64, "sliding_window": 128}


def test_the_published_olmoe(config_of, caplog):
    config = config_of(OLMOE)
    assert (config.num_layers, config.d_model, config.vocab_size) == (16, 2048, 50304)
    assert (config.block.ffn.num_experts, config.block.ffn.router.k) == (64, 8)
    assert config.block.ffn.experts.d_ff == 1024
    assert config.block.ffn.router.normalise == "before"
    assert (config.dtype, config.param_dtype, config.max_length) == ("bfloat16", "bfloat16", 4096)
    assert not caplog.records
    config.block.ffn.router.k = 4  # overrides reach inside
    model = fdl.build(config)
    assert model.block.ffn.router.k == 4
    assert model.block.ffn.balance == (Unbalanced(),)
    assert model.block.attention.qk_norm.num_axes == 2


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"num_experts": ..., "num_local_experts": 64}, id="experts"),
        pytest.param({"torch_dtype": ..., "dtype": "bfloat16"}, id="dtype"),
        pytest.param({"num_key_value_heads": ...}, id="key heads are heads"),
        pytest.param(
            {
                "rope_theta": ...,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            id="rope",
        ),
        pytest.param(
            {"hidden_act": ..., "norm_topk_prob": ..., "rms_norm_eps": ...}, id="defaults"
        ),
    ],
)
def test_both_generations_say_the_same(config_of, changes):
    assert fdl.build(config_of(OLMOE)) == fdl.build(config_of(OLMOE, **changes))


YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize(
    "stated, expected",
    [
        ({"type": "linear", "factor": 4}, LinearScaling(factor=4.0)),
        (YARN, YarnScaling(factor=4.0, original_context=32768)),
        (YARN | {"truncate": False}, YarnScaling(factor=4, original_context=32768, truncate=False)),
        (LLAMA3, Llama3Scaling(original_context=4096)),  # max_position_embeddings
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaling_rules(config_of, stated, expected, key):
    rope = fdl.build(config_of(QWEN3, rope_theta=1e6, **{key: stated})).block.attention.rope
    assert rope == Rope(theta=1e6, scaling=expected)


def test_gpt_oss_without_rope_means_its_published_yarn(config_of):
    rope = fdl.build(config_of(GPT_OSS, rope_theta=...)).block.attention.rope
    scaling = YarnScaling(factor=32.0, original_context=4096, truncate=False)
    assert rope == Rope(theta=150_000.0, scaling=scaling)


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "values, changes, windows",
    [
        (QWEN3, {}, (None,)),
        (QWEN3, {"sliding_window": 9}, (None,)),  # not used
        (QWEN3, {"sliding_window": 9, "use_sliding_window": True}, (9,)),
        (QWEN3, {"sliding_window": ..., "use_sliding_window": True}, (4096,)),
        (QWEN3, {"sliding_window": None, "use_sliding_window": True}, (None,)),
        (QWEN2, {"sliding_window": 9, "use_sliding_window": True}, (9, None)),
        (QWEN2, {"sliding_window": None, "use_sliding_window": True}, (None,)),
        (OLMOE | {"model_type": "mixtral"}, {"sliding_window": 9}, (9,)),
        (OLMOE | {"model_type": "mixtral"}, {}, (None,)),
        (GPT_OSS, {}, (128, None)),
        (
            GPT_OSS,
            {"num_hidden_layers": 3, "layer_types": [FULL, FULL, SLIDING]},
            (None, None, 128),
        ),
    ],
)
def test_windows(config_of, values, changes, windows):
    assert config_of(values, **changes).windows == windows


def test_dense_layers(config_of):
    config = config_of(QWEN3, decoder_sparse_step=2)
    assert (config.moe_every, config.first_k_dense, config.dense_ffn.d_ff) == (2, 0, 1024)
    config = config_of(QWEN3, mlp_only_layers=[1, 0])
    assert (config.moe_every, config.first_k_dense, config.dense_ffn.d_ff) == (1, 2, 1024)
    assert config_of(QWEN3).dense_ffn is None


@pytest.mark.parametrize(
    "values, changes, text",
    [
        (
            OLMOE,
            {"model_type": "gpt2"},
            "'gpt2' is not an architecture .* glm4_moe, gpt_oss, llama, mix",
        ),
        (OLMOE, {"model_type": ...}, "lacks model_type"),
        (OLMOE, {"hidden_size": ...}, "lacks hidden_size"),
        (OLMOE, {"num_experts": ...}, "lacks num_experts or num_local_experts"),
        (OLMOE, {"num_local_experts": 8}, "contradicts itself: num_experts=64 and num_local_"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported, only None"),
        (OLMOE, {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only 'silu'"),
        (OLMOE, {"torch_dtype": "float8"}, "='float8' is not supported"),
        (OLMOE, {"quantization_config": {"quant_method": "mxfp4"}}, "quantised by .* 'mxfp4'"),
        (OLMOE, {"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope' is not supp"),
        (OLMOE, {"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' lacks factor"),
        (OLMOE, {"rope_parameters": {FULL: {}}}, "differ between kinds of layers"),
        (
            OLMOE,
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8}},
            "rope_scaling and rope_parameters differ in factor",
        ),
        (QWEN3, {"mlp_only_layers": [3]}, r"mlp_only_layers=\[3\] with decoder_sparse_step=1"),
        (GPT_OSS, {"layer_types": [FULL]}, "for each of the 16 layers"),
        (GPT_OSS, {"sliding_window": None}, "a window, but sliding_window is null: state its wi"),
        (
            QWEN2,
            {"layer_types": [SLIDING] * 16, "sliding_window": 9},
            "layer_types names sliding_attention, but use_sliding_window and sliding_window give",
        ),
        (
            QWEN2,
            {"layer_types": [SLIDING] * 16, "use_sliding_window": True},
            "layer_types names sliding_attention, but use_sliding_window and sliding_window give",
        ),
        (GPT_OSS, {"swiglu_limit": 10.0}, "swiglu_limit=10.0 is not supported, only 7.0"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(config_of, values, changes, text, tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/config.json.*{text}"):
        config_of(values, **changes)


def test_what_the_model_refuses_names_the_file(config_of, tmp_path):
    config_of(OLMOE, num_hidden_layers=0)
    with pytest.raises(UserError, match=r"config.json: model.num_layers=0 must be") as error:
        hf.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, True, False, 0])
def test_an_unknown_value_is_reported(config_of, caplog, value):
    """Off or 0 too: it may be on by default."""
    config_of(OLMOE, new_kind_of_gate=value)
    assert "ignored, as unknown here: new_kind_of_gate" in caplog.text


def test_what_transformers_writes_of_itself_is_not_reported(config_of, caplog):
    off = ("add_cross_attention", "is_decoder", "is_encoder_decoder", "torchscript", "do_sample")
    usual = dict.fromkeys((*off, "output_attentions", "use_cache"), False)
    config_of(OLMOE, **usual, hidden_dropout=0.0, min_length=0, pruned_heads={}, prefix=None)
    assert not caplog.records
    config_of(OLMOE, add_cross_attention=True)
    assert "ignored, as unknown here: add_cross_attention" in caplog.text
