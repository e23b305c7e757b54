"""The configs of published models are those models: config.json, and the published sizes.

Values of config.json (`published.py`) come from memory, and were checked against what is at hand:
the defaults of transformers 5.23 (Mixtral but for `max_position_embeddings`; OLMoE but for
`intermediate_size`; gpt-oss-120b; DeepSeek-V3), table 10 of arXiv 2409.02060 (OLMoE), and copies
in public repositories (gpt-oss; Qwen3's sizes). From memory alone: `max_position_embeddings` of
Mixtral, Qwen3 and DeepSeek-V3, Qwen3's `rope_theta`, and every `router_aux_loss_coef`. Parameter
counts are from the model cards and papers.
"""

import functools
import json

import fiddle as fdl
import jax
import pytest

from moejax.config.build import build_config
from moejax.config.load import load_config
from moejax.interop import hf
from moejax.interop.same_model import differences
from moejax.models.flops import size
from moejax.optim import freeze
from moejax.types import named_leaves
from tests.configs.published import PUBLISHED
from tests.configs.test_every_config import ROOT


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@functools.cache
def shipped(spec):
    """(the config, its model with the vocabulary of its tokenizer)."""
    config = load_config(spec)
    return config, build_config(config).build_model(config.data.tokenizer.vocab_size)


@pytest.mark.parametrize("spec", PUBLISHED)
def test_the_model_is_that_of_the_published_config_json(spec, tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[spec]))
    published = fdl.build(hf.model_config(tmp_path))
    assert not caplog.records  # every value was understood
    _, ours = shipped(spec)
    assert differences(ours, published) == []
    # What is no difference of the function.
    assert ours.max_length == published.max_length
    assert ours.dtype == "bfloat16"
    assert ours.param_dtype == "float32"


def test_a_wrong_number_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["configs/olmoe_1b_7b.py"]))
    _, ours = shipped("configs/qwen3_30b_a3b.py")
    found = differences(ours, fdl.build(hf.model_config(tmp_path)))
    assert "model.num_layers is 48 and not 16" in found
    assert "model.block.ffn.experts.d_ff is 768 and not 1024" in found


@pytest.mark.parametrize(
    "spec, total, active",
    [  # in billions, with the digits that are published
        ("configs/olmoe_1b_7b.py", "6.92", "1.28"),
        ("configs/mixtral_8x7b.py", "46.7", "12.9"),
        ("configs/qwen3_30b_a3b.py", "30.5", "3.4"),  # 3.3 in the paper; 3.35 here
        ("configs/gpt_oss_20b.py", "20.91", "3.61"),
        ("configs/gpt_oss_20b.py:large", "116.83", "5.13"),
        ("configs/deepseek_v3.py", "671", "37"),
    ],
)
def test_parameters_are_as_many_as_published(spec, total, active):
    config, model = shipped(spec)
    got = size(model, config.sequence_length)
    embedding = model.vocab_size * model.d_model
    # OpenAI and DeepSeek do not count the embedding among the active ones: it is a look-up.
    looked_up = embedding if "gpt_oss" in spec or "deepseek" in spec else 0
    digits = lambda text: len(text.partition(".")[2])
    assert f"{got.params / 1e9:.{digits(total)}f}" == total
    assert f"{(got.active_params - looked_up) / 1e9:.{digits(active)}f}" == active


@pytest.mark.parametrize("spec", [spec for spec in PUBLISHED if ":" not in spec])
def test_tuning_trains_the_routers_of_the_last_five_layers(spec):
    config, model = shipped(f"{spec}:tuning")
    shapes = jax.eval_shape(model.init, jax.random.key(0))["params"]
    trained, _ = freeze.split(shapes, config.trainable)
    router = (model.d_model + model.block.ffn.router.use_bias) * model.block.ffn.num_experts
    leaves = named_leaves(trained)
    assert all("/ffn/router/" in path for path in leaves)
    assert sum(leaf.size for leaf in leaves.values()) == 5 * router
    layers = {path.split("/")[0] for path in leaves}
    last = [s.indices(i) for s in model.segments for i, n in enumerate(s.names) if n in layers]
    assert sorted(sum(last, [])) == list(range(model.num_layers - 5, model.num_layers))
    # The paper of RoMA (arXiv 2511.07419) gives this share for OLMoE.
    share = {"configs/olmoe_1b_7b.py": "0.0095", "configs/qwen3_30b_a3b.py": "0.0043"}
    total = sum(leaf.size for leaf in named_leaves(shapes).values())
    assert f"{100 * 5 * router / total:.4f}" == share.get(spec, f"{100 * 5 * router / total:.4f}")
    # The same function of the weights as the model that was imported.
    assert differences(model, shipped(spec)[1]) == []
    assert model.param_dtype == "float32"  # small updates of a bfloat16 router would be rounded off
