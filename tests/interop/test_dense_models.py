"""Dense Llama and Qwen3: published files become the published models."""

import dataclasses
import json
import re

import fiddle as fdl
import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.experts.dense import DenseGLU
from moejax.interop import hf
from moejax.layers.rope import Llama3Scaling, Rope
from tests.interop.tiny_checkpoints import MODELS, edit_config, written

LLAMA = {  # meta-llama/Llama-3.1-8B, as transformers 4.45 prints it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN3 = {  # Qwen/Qwen3-8B
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_published_llama(config_of, caplog):
    model = fdl.build(config_of(LLAMA))
    assert not caplog.records
    attention = model.block.attention
    assert (model.num_layers, model.d_model, model.vocab_size) == (32, 4096, 128256)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (32, 8, 128)
    assert attention.rope == Rope(theta=500_000.0, scaling=Llama3Scaling())
    assert attention.qk_norm is None
    assert (model.block.ffn.d_ff, model.block.norm.epsilon) == (14336, 1e-5)
    assert isinstance(model.block.ffn, DenseGLU)
    assert model.moe is None
    assert _num_params(model) == 8_030_261_248


def test_the_published_qwen3(config_of, caplog):
    model = fdl.build(config_of(QWEN3))
    assert not caplog.records
    assert model.windows == (None,)
    assert model.block.attention.qk_norm.num_axes == 1
    assert model.block.attention.rope == Rope(theta=1e6)
    assert (model.block.ffn.d_ff, model.tied_head, model.moe) == (12288, False, None)
    assert _num_params(model) == 8_190_735_360


def _num_params(model) -> int:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_what_files_leave_out(config_of):
    names = ("head_dim", "hidden_act", "attention_bias", "tie_word_embeddings", "rms_norm_eps")
    for values, head_dim in ((LLAMA, None), (QWEN3, 128)):
        config = config_of(values, **dict.fromkeys(names, ...))
        assert config.block.attention.head_dim == head_dim
        assert (config.block.norm.epsilon, config.block.ffn.activation) == (1e-6, "silu")
        assert (config.block.attention.use_bias, config.tied_head) == (False, False)


def test_biases(config_of):
    attention = config_of(LLAMA, attention_bias=True).block.attention
    assert (attention.use_bias, attention.use_output_bias) == (True, True)
    assert config_of(LLAMA, mlp_bias=True).block.ffn.use_bias
    assert not config_of(LLAMA).block.ffn.use_bias


SLIDING, FULL = "sliding_attention", "full_attention"
USED = {"num_hidden_layers": 3, "use_sliding_window": True}


@pytest.mark.parametrize(
    "changes, windows",
    [
        ({"sliding_window": 9}, (None,)),  # not used
        (USED | {"sliding_window": 9, "max_window_layers": 1}, (None, 9, 9)),
        (USED | {"sliding_window": 9, "max_window_layers": 0}, (9,)),
        (USED | {"sliding_window": 9, "max_window_layers": ...}, (None,)),  # from layer 28 on
        (USED | {"sliding_window": ..., "max_window_layers": 2}, (None, None, 4096)),
        (USED | {"sliding_window": None, "max_window_layers": 0}, (None,)),
        (USED | {"sliding_window": 9, "layer_types": [SLIDING, FULL, FULL]}, (9, None, None)),
    ],
)
def test_windows_of_qwen3(config_of, changes, windows):
    assert config_of(QWEN3, **changes).windows == windows


@pytest.mark.parametrize(
    "values, changes, text",
    [
        (LLAMA, {"intermediate_size": ...}, "lacks intermediate_size"),
        (LLAMA, {"hidden_act": "relu2"}, "hidden_act='relu2' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not"),
        (QWEN3, USED | {"layer_types": [FULL, SLIDING]}, "for each of the 3 layers"),
        (
            QWEN3,
            {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING], "sliding_window": 9},
            "layer_types names sliding_attention, but use_sliding_window and sliding_window give",
        ),
        (LLAMA, {"quantization_config": {"quant_method": "mxfp4"}}, "quantised by .* 'mxfp4'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(config_of, values, changes, text, tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}/config.json.*{text}") as error:
        config_of(values, **changes)
    assert "\n" not in str(error.value)


def test_a_window_in_the_last_layer_is_written_so_that_it_is_read(tmp_path):
    values = json.loads((written("qwen3", tmp_path / "hf") / "config.json").read_text())
    assert values["layer_types"] == [FULL, SLIDING]
    assert (values["sliding_window"], values["use_sliding_window"]) == (5, True)


def test_a_dense_model_that_neither_can_say_is_refused(tmp_path):
    """Biases on the output alone, which no field of either states."""
    attention = MODELS["llama"].block.attention.clone(use_bias=False)
    block = MODELS["llama"].block.clone(attention=attention)
    model = dataclasses.replace(MODELS["llama"], block=block)
    with pytest.raises(UserError, match=r"nearest is llama, but .*use_output_bias is True"):
        hf.save(model, {}, tmp_path / "hf")


def test_a_published_llama_without_biases_does_not_read_those_of_its_file(tmp_path):
    written("llama", tmp_path / "hf")
    edit_config(tmp_path / "hf", mlp_bias=False)
    with pytest.raises(UserError, match=r"mlp.down_proj.bias and 5 more, which the model"):
        hf.load(tmp_path / "hf")
