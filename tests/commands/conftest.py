"""A published checkpoint, as small as can be."""

import json
import pathlib

import fiddle as fdl
import jax
import pytest

from moejax.data.subword import train_bpe
from moejax.interop import hf
from tests.interop.tiny_checkpoints import written


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A bfloat16 OLMoE of two layers with a tokenizer, as transformers stores them."""
    folder = tmp_path_factory.mktemp("published") / "olmoe"
    config = hf.model_config(written("olmoe", folder.with_name("golden")))
    config.vocab_size, config.dtype, config.param_dtype = 320, "float32", "float32"
    model = fdl.build(config)
    hf.save(model, model.init(jax.random.key(1)), folder, dtype="bfloat16")
    texts = [path.read_text() for path in sorted(pathlib.Path("moejax/data").glob("*.py"))]
    spec = train_bpe(texts, 300).spec()
    model_json = spec["model"] | {
        "added_tokens": [
            {"id": 299, "content": "<|end|>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ]
    }
    (folder / "tokenizer.json").write_text(json.dumps(model_json))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder
