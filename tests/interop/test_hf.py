"""Directories of every architecture are read and written without changing a bit."""

import dataclasses
import json

import fiddle as fdl
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny as tiny_config
from moejax.balance.unbalanced import Unbalanced
from moejax.errors import UserError
from moejax.interop import architecture, hf
from moejax.verification.contracts.cases import quick_jit, random_tree
from tests.interop.tiny_checkpoints import (
    MODELS,
    WEIGHTS,
    edit_config,
    edit_tensors,
    golden,
    tensors,
    variables,
    written,
)
from tests.models.tiny_model import tiny


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def test_every_architecture_is_tested():
    assert set(architecture.known()) == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_golden_parameters_through_a_directory_give_the_golden_logits(name, tmp_path):
    model, loaded = hf.load(written(name, tmp_path / "hf"))
    assert model == MODELS[name]
    assert_same_tree(loaded, variables(name))
    logits = quick_jit(lambda v, t: model.apply(v, t).logits)(loaded, golden(name)["tokens"])
    np.testing.assert_allclose(logits, golden(name)["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "bfloat16") for name in MODELS] + [("gpt_oss", "float16"), ("olmoe", "float32")],
)
def test_a_directory_loaded_and_saved_has_the_same_bytes(name, dtype, tmp_path):
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape)), variables(name))
    hf.save(MODELS[name], drawn, tmp_path / "first", dtype=dtype)
    model, loaded = hf.load(tmp_path / "first")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(loaded["params"])} == {dtype}
    hf.save(model, loaded, tmp_path / "second")
    first, second = (tmp_path / d / WEIGHTS for d in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((tmp_path / "second/config.json").read_text())["torch_dtype"] == dtype


NAMES = {
    "deepseek_v2": ("model.layers.1.self_attn.kv_a_proj_with_mqa.bias", (18,)),
    "deepseek_v3": ("model.layers.0.self_attn.q_b_proj.weight", (56, 12)),
    "glm4_moe": ("model.layers.1.mlp.shared_experts.up_proj.weight", (8, 16)),
    "gpt_oss": ("model.layers.1.mlp.experts.gate_up_proj_bias", (4, 16)),
    "llama": ("model.layers.1.mlp.down_proj.bias", (16,)),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.3.w2.weight", (16, 8)),
    "olmoe": ("model.layers.0.self_attn.q_norm.weight", (16,)),
    "phimoe": ("model.layers.1.post_attention_layernorm.bias", (16,)),
    "qwen2_moe": ("model.layers.0.mlp.shared_expert_gate.weight", (1, 16)),
    "qwen3": ("model.layers.1.self_attn.k_norm.weight", (8,)),
    "qwen3_moe": ("model.layers.1.mlp.experts.2.gate_proj.weight", (8, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_files_have_the_published_names_and_shapes(name, tmp_path):
    stored = tensors(written(name, tmp_path / "hf"))
    tensor, shape = NAMES[name]
    assert stored[tensor].shape == shape
    assert stored["lm_head.weight"].shape == (24, 16)


def _fuse(stored: dict, router: str) -> None:
    """As transformers 5 holds experts: [E, 2F, D] with gate first, and [E, D, F]."""
    for layer in range(2):
        for prefix, names in {
            "mlp": ("gate_proj", "up_proj", "down_proj"),
            "block_sparse_moe": ("w1", "w3", "w2"),
        }.items():
            of = f"model.layers.{layer}.{prefix}"
            if f"{of}.experts.0.{names[0]}.weight" not in stored:
                continue
            gate, up, down = (
                np.stack([stored.pop(f"{of}.experts.{e}.{name}.weight") for e in range(4)])
                for name in names
            )
            into = f"model.layers.{layer}.mlp"
            stored[f"{into}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
            stored[f"{into}.experts.down_proj"] = down
            stored[f"{into}.{router}.weight"] = stored.pop(f"{of}.gate.weight")


@pytest.mark.parametrize(
    "name", ["glm4_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]
)
def test_fused_experts_are_read_like_a_tensor_per_expert(name, tmp_path):
    directory = written(name, tmp_path / "hf")
    router = "router" if name == "phimoe" else "gate"
    edit_tensors(directory, lambda stored: _fuse(stored, router))
    assert "model.layers.1.mlp.experts.gate_up_proj" in tensors(directory)
    assert_same_tree(hf.load(directory)[1], variables(name))


def test_experts_are_in_the_order_of_their_numbers(tmp_path):
    """As words, expert 10 comes before expert 2."""
    ffn = MODELS["olmoe"].block.ffn.clone(num_experts=12)
    model = dataclasses.replace(MODELS["olmoe"], block=MODELS["olmoe"].block.clone(ffn=ffn))
    drawn = variables("olmoe")
    layer = drawn["params"]["layers_0"]["ffn"]
    rng = np.random.default_rng(0)
    for part, leaf in layer["experts"].items():
        layer["experts"][part] = rng.random((2, 12, *leaf.shape[2:]), np.float32)
    layer["router"]["kernel"] = rng.random((2, 16, 12), np.float32)
    hf.save(model, drawn, tmp_path / "hf")
    _, loaded = hf.load(tmp_path / "hf")
    stored = tensors(tmp_path / "hf")
    for layer in range(2):
        for e in range(12):
            np.testing.assert_array_equal(
                loaded["params"]["layers_0"]["ffn"]["experts"]["down"][layer, e],
                stored[f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight"].T,
            )


def test_shards_hold_what_one_file_holds(tmp_path):
    one, many = written("qwen3_moe", tmp_path / "one"), tmp_path / "many"
    written("qwen3_moe", many, max_shard_bytes=3000)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert (many / file).stat().st_size < 3000 + 4000  # values and header
    assert_same_tree(hf.load(many)[1], hf.load(one)[1])
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(one).keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors(one).values())


def test_how_layers_are_stacked_does_not_show_in_the_file(tmp_path):
    model = dataclasses.replace(MODELS["olmoe"], boundaries=(1,))
    whole = variables("olmoe")
    split = {"params": dict(whole["params"])}
    stacked = split["params"].pop("layers_0")
    for row in range(2):
        split["params"][f"layers_{row}"] = jax.tree.map(lambda x, r=row: x[r : r + 1], stacked)
    hf.save(model, split, tmp_path / "split")
    one = written("olmoe", tmp_path / "whole")
    assert (tmp_path / "split" / WEIGHTS).read_bytes() == (one / WEIGHTS).read_bytes()


def test_router_state_is_kept_in_float32(tmp_path):
    written("glm4_moe", tmp_path / "hf", dtype="bfloat16")
    _, loaded = hf.load(tmp_path / "hf")
    assert loaded["params"]["embed"]["embedding"].dtype == jnp.bfloat16
    expected = variables("glm4_moe")["router_state"]
    assert_same_tree(loaded["router_state"], expected)
    assert np.abs(expected["layers_1"]["ffn"]["balance_0_correction_bias"]).max() > 0


def test_tied_weights_are_stored_once_and_read_twice(tmp_path):
    model = dataclasses.replace(MODELS["mixtral"], tied_head=True)
    params = {k: v for k, v in variables("mixtral")["params"].items() if k != "head"}
    hf.save(model, {"params": params}, tmp_path / "hf")
    assert "lm_head.weight" not in tensors(tmp_path / "hf")
    embedding = tensors(tmp_path / "hf")["model.embed_tokens.weight"]
    edit_tensors(tmp_path / "hf", lambda stored: stored.update({"lm_head.weight": embedding}))
    again, loaded = hf.load(tmp_path / "hf")
    assert again == model
    assert_same_tree(loaded, {"params": params})


def test_config_and_tokenizer_are_carried_along(tmp_path):
    source = written("olmoe", tmp_path / "source")
    edit_config(source, eos_token_id=7, max_position_embeddings=64)
    (source / "tokenizer.json").write_text("{}")
    (source / "secret.env").write_text("no")
    model, loaded = hf.load(source)
    hf.save(model, loaded, tmp_path / "copy", source=source, dtype="bfloat16")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"config.json", "tokenizer.json", WEIGHTS}
    theirs, ours = (
        json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "copy")
    )
    assert ours == theirs | {"torch_dtype": "bfloat16"}


def test_a_source_of_another_model_is_refused(tmp_path):
    source = written("olmoe", tmp_path / "source")
    edit_config(source, norm_topk_prob=True)
    with pytest.raises(UserError, match=r"config.json describes another model: here .*normalise"):
        hf.save(MODELS["olmoe"], variables("olmoe"), tmp_path / "new", source=source)


def test_a_model_that_no_architecture_expresses_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the nearest is \w+, but here model\."):
        hf.save(tiny(), {}, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_model_pretrained_here_finds_its_architecture(tmp_path):
    model = fdl.build(tiny_config.smoke().model)
    model = dataclasses.replace(model, vocab_size=24, boundaries=(1,), remat="full")
    drawn = random_tree(jax.eval_shape(model.init, jax.random.key(0)))
    hf.save(model, drawn, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "qwen3_moe"
    again, _ = hf.load(tmp_path / "hf")
    assert again.block.attention.qk_norm == model.block.attention.qk_norm


def test_a_missing_correction_bias_is_no_zero(tmp_path):
    ffn = MODELS["glm4_moe"].block.ffn.clone(balance=(Unbalanced(),))
    model = dataclasses.replace(MODELS["glm4_moe"], block=MODELS["glm4_moe"].block.clone(ffn=ffn))
    params = {"params": variables("glm4_moe")["params"]}
    with pytest.raises(UserError, match="e_score_correction_bias and this model nothing for it"):
        hf.save(model, params, tmp_path / "hf")


def _params(**changes) -> dict:
    return {"params": variables("olmoe")["params"] | changes}


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"params": {}}, "variables lack the leaf params/embed/embedding"),
        (_params(head={"kernel": np.zeros((16, 23))}), r"params/head/kernel has shape \[16, 23\]"),
        (_params(extra={"bias": np.zeros(2)}), "params/extra/bias is none of the model's"),
        (_params() | {"lora": {}}, "the collection lora has no place"),
    ],
)
def test_variables_that_do_not_fit_are_refused(bad, text, tmp_path):
    with pytest.raises(UserError, match=text):
        hf.save(MODELS["olmoe"], bad, tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path):
    large = np.full((16, 24), 1e6, np.float32)
    with pytest.raises(UserError, match=r"params/head/kernel .* too large for float16"):
        hf.save(MODELS["olmoe"], _params(head={"kernel": large}), tmp_path / "hf", dtype="float16")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    directory = written("olmoe", tmp_path / "hf")
    before = (directory / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        written("olmoe", directory, dtype="bfloat16")
    assert (directory / WEIGHTS).read_bytes() == before
