"""Phi-3.5-MoE: the published file becomes the published model, and what is special about it."""

import json
import re

import fiddle as fdl
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.interop import hf
from moejax.layers.norm import LayerNorm
from moejax.layers.rope import LongRopeScaling, Rope
from moejax.models.flops import size
from moejax.routers.sparsemixer import SparseMixer
from tests.interop.tiny_checkpoints import MODELS, edit_tensors, tensors, variables, written

SHORT, LONG = [1 + i / 64 for i in range(64)], [1.0 + i for i in range(64)]  # not the published
ROPE = {
    "long_factor": LONG,
    "long_mscale": 1.243163121016122,
    "original_max_position_embeddings": 4096,
    "short_factor": SHORT,
    "short_mscale": 1.243163121016122,
    "type": "longrope",
}
PHI = {  # microsoft/Phi-3.5-MoE-instruct
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phimoe.PhiMoEConfig"},
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": ROPE,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}


def test_the_published_file(config_of, caplog):
    model = fdl.build(config_of(PHI))
    assert model.head_bias
    assert not config_of(PHI, lm_head_bias=False).head_bias
    assert not caplog.records
    attention, ffn = model.block.attention, model.block.ffn
    assert model.block.norm == LayerNorm(epsilon=1e-5)
    assert (attention.num_heads, attention.num_kv_heads) == (32, 8)
    assert (attention.use_bias, attention.use_output_bias) == (True, True)
    scaling = LongRopeScaling(
        short_factors=tuple(SHORT),
        long_factors=tuple(LONG),
        short_amplitude=1.243163121016122,
        long_amplitude=1.243163121016122,
        original_context=4096,
    )
    assert attention.rope == Rope(theta=10_000.0, scaling=scaling)
    assert ffn.router == SparseMixer(jitter=0.01)
    assert (ffn.num_experts, ffn.experts.d_ff) == (16, 6400)
    assert (model.windows, model.max_length) == ((131072,), 131072)
    got = size(model, 4096)
    assert (round(got.params / 1e9, 1), round(got.active_params / 1e9, 1)) == (41.9, 6.6)


def test_what_files_leave_out(config_of):
    names = ("rope_scaling", "rope_theta", "router_jitter_noise", "attention_bias")
    config = config_of(PHI, **dict.fromkeys(names, ...), sliding_window=None)
    assert fdl.build(config).block.attention.rope == Rope(theta=1e6)
    assert (config.block.ffn.router.jitter, config.windows) == (0.01, (None,))
    assert not config.block.attention.use_bias


def test_where_the_original_context_may_be_stated(config_of):
    beside = {k: v for k, v in ROPE.items() if k != "original_max_position_embeddings"}
    top = "original_max_position_embeddings"
    for changes in ({"rope_scaling": beside}, {top: ...}):
        assert fdl.build(config_of(PHI, **changes)) == fdl.build(config_of(PHI))
    config = config_of(PHI, rope_scaling=beside, **{top: ...})
    assert config.block.attention.rope.scaling.original_context == 131072


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"num_experts_per_tok": 3}, "num_experts_per_tok=3 is not supported, only 2"),
        ({"original_max_position_embeddings": 8192}, "is 8192 and, in the RoPE parameters, 4096"),
        ({"rope_scaling": ROPE | {"long_mscale": None}}, "'longrope' lacks long_mscale"),
        ({"rope_scaling": ROPE | {"type": "yarn"}}, "'yarn' is not supported, only default, longr"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(config_of, changes, text, tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/config.json.*{text}") as error:
        config_of(PHI, **changes)
    assert "\n" not in str(error.value)


def test_a_factor_too_few_is_one_sentence(tmp_path):
    directory = written("phimoe", tmp_path / "hf")
    path = directory / "config.json"
    values = json.loads(path.read_text())
    for key in ("rope_scaling", "rope_parameters"):
        values[key]["short_factor"] = [1.0, 2.0, 3.0]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="3 factors, but 8 rotated features need 4"):
        hf.load(directory)


def test_factors_are_written_as_they_were_read(tmp_path):
    values = json.loads((written("phimoe", tmp_path / "hf") / "config.json").read_text())
    scaling = MODELS["phimoe"].block.attention.rope.scaling
    assert values["rope_scaling"]["long_factor"] == list(scaling.long_factors)
    assert values["rope_parameters"]["short_mscale"] == scaling.short_amplitude
    assert values["rope_scaling"]["rope_type"] == "longrope"
    assert (values["router_jitter_noise"], values["lm_head_bias"]) == (0.4, True)


def test_biases_of_norms_are_read_from_where_they_belong(tmp_path):
    directory = written("phimoe", tmp_path / "hf")
    params = variables("phimoe")["params"]
    found = tensors(directory)
    for leaf, tensor in (("attention_norm", "input"), ("ffn_norm", "post_attention")):
        for layer in range(2):
            name = f"model.layers.{layer}.{tensor}_layernorm.bias"
            np.testing.assert_array_equal(found[name], params["layers_0"][leaf]["bias"][layer])
    np.testing.assert_array_equal(found["model.norm.bias"], params["final_norm"]["bias"])
    edit_tensors(directory, lambda stored: stored.pop("model.norm.bias"))
    with pytest.raises(UserError, match="lacks tensor model.norm.bias"):
        hf.load(directory)
