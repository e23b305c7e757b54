"""Every kind of damage to a directory is one sentence that names the file and the tensor."""

import json
import re
import shutil

import numpy as np
import pytest

from moejax.commands import main
from moejax.config import run_directory
from moejax.config.load import load_config
from moejax.errors import UserError
from moejax.interop import hf, tensor_writer
from tests.interop.tiny_checkpoints import WEIGHTS, edit_config, edit_tensors, variables, written

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    written("olmoe", root / "one")
    written("olmoe", root / "shards", max_shard_bytes=3000)
    return root


@pytest.fixture
def one(originals, tmp_path):
    return shutil.copytree(originals / "one", tmp_path / "one")


@pytest.fixture
def shards(originals, tmp_path):
    return shutil.copytree(originals / "shards", tmp_path / "shards")


def refused(directory, *words: str) -> None:
    """Loading is a UserError of one sentence that holds all of the words, in order."""
    with pytest.raises(UserError, match=".*".join(re.escape(word) for word in words)) as error:
        hf.load(directory)
    assert "\n" not in str(error.value)


def shard_of(directory, tensor: str) -> str:
    return json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def edit_index(directory, **changes: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= {key.replace("__", "."): value for key, value in changes.items()}
    (directory / INDEX).write_text(json.dumps(index))


def test_a_missing_shard(shards):
    shard = shard_of(shards, EMBEDDING)
    (shards / shard).unlink()
    refused(shards, f"the shard {shards / shard} is missing", f"names for tensor {EMBEDDING}")


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "length", "header", "values"])
def test_a_truncated_file(one, keep):
    data = (one / WEIGHTS).read_bytes()
    (one / WEIGHTS).write_bytes(data[:keep])
    refused(one, str(one / WEIGHTS), "is truncated or not a safetensors file")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3])
def test_an_index_that_points_outside(shards, shard):
    edit_index(shards, model__norm__weight=shard)
    refused(shards, str(shards / INDEX), "points outside its folder", repr(shard))


def test_an_index_that_names_a_tensor_its_shard_lacks(shards):
    last = shard_of(shards, "model.norm.weight")
    edit_index(shards, model__embed_tokens__weight=last)
    refused(shards, str(shards / last), f"lacks tensor {EMBEDDING}")


def test_a_tensor_in_two_shards(shards):
    shard = shards / shard_of(shards, EMBEDDING)
    shutil.copyfile(shard, shards / "again.safetensors")
    edit_index(shards, extra="again.safetensors")
    refused(shards, "is in both", "again.safetensors", "and", shard.name, ": keep one")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}'])
def test_an_index_that_is_none(shards, content):
    (shards / INDEX).write_text(content)
    refused(shards, str(shards / INDEX))


def test_pickles_are_refused_and_not_read(one):
    (one / WEIGHTS).rename(one / "pytorch_model.bin")
    refused(one, "only as pickle files (pytorch_model.bin), which can run code")


def test_no_weights_and_no_config(one):
    (one / WEIGHTS).unlink()
    refused(one, str(one), "holds neither model.safetensors nor")
    (one / "config.json").unlink()
    refused(one, str(one / "config.json"), "is missing")


@pytest.mark.parametrize(
    "tensor", [EMBEDDING, EXPERT, "model.layers.0.mlp.experts.0.up_proj.weight"]
)
def test_a_missing_tensor(one, tensor):
    edit_tensors(one, lambda stored: stored.pop(tensor))
    refused(one, f"{one} lacks tensor {tensor} (for params/")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.experts.4.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.mlp.experts.down_proj",  # beside a tensor per expert
    ],
)
def test_an_unknown_tensor(one, tensor):
    edit_tensors(one, lambda stored: stored.update({tensor: np.zeros(16, np.float32)}))
    refused(one, str(one / WEIGHTS), f"holds tensor {tensor}, which the model")


def test_buffers_of_old_files_are_skipped(one):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(one, lambda stored: stored.update({name: np.zeros(2, np.float32)}))
    _, loaded = hf.load(one)
    expected = variables("olmoe")["params"]["head"]["kernel"]
    np.testing.assert_array_equal(loaded["params"]["head"]["kernel"], expected)


def test_a_tensor_of_another_shape(one):
    edit_tensors(one, lambda stored: stored.update({EXPERT: stored[EXPERT].T}))
    refused(one, str(one / WEIGHTS), EXPERT, "has shape [16, 8], but config.json", "[8, 16]")


def test_a_tensor_of_another_dtype(one):
    edit_tensors(one, lambda stored: stored.update({EXPERT: stored[EXPERT].astype(np.int8)}))
    refused(one, str(one / WEIGHTS), EXPERT, "is stored as I8")


def test_tied_weights_that_differ(one):
    edit_config(one, tie_word_embeddings=True)
    refused(one, str(one / WEIGHTS), "lm_head.weight differs from", EMBEDDING)


def test_an_extra_prediction_layer_is_left_out(tmp_path, caplog):
    directory = written("glm4_moe", tmp_path / "hf")
    extra = {"model.layers.2.eh_proj.weight": np.zeros((2, 2), np.float32)}
    edit_tensors(directory, lambda stored: stored.update(extra))
    hf.load(directory)
    assert "not loaded" in caplog.text
    assert "model.layers.2.eh_proj.weight" in caplog.text


def test_a_killed_import_leaves_nothing_that_looks_whole(one, tmp_path, monkeypatch):
    """A killed process cannot clean up: what it wrote has neither the name nor a config.json."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as process:
        process.setattr(tensor_writer.shutil, "rmtree", lambda *_, **__: None)
        process.setattr(run_directory, "store", killed)  # everything else is written by then
        with pytest.raises(KeyboardInterrupt):
            main(["import-hf", str(one), str(tmp_path / "out")])
    (left,) = set(tmp_path.iterdir()) - {one}
    assert left.name.startswith(".out.partial-")
    assert any(left.rglob("manifest.json"))
    with pytest.raises(UserError, match="is no run: it holds no config.json"):
        load_config(left)
    shutil.rmtree(left)
    assert main(["import-hf", str(one), str(tmp_path / "out")]) == 0
