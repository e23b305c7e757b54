"""A small checkpoint with a tokenizer, stored as transformers stores it."""

import json
import pathlib

import fiddle as fdl
import jax

from moejax.data.subword import train_bpe
from moejax.interop import hf
from tests.interop.tiny_checkpoints import written


def publish(folder: pathlib.Path, *, dtype: str, **config_of_tokenizer: object) -> pathlib.Path:
    """An OLMoE of two layers, computed in float32, with a BPE of moejax's own source."""
    config = hf.model_config(written("olmoe", folder.with_name("golden")))
    config.vocab_size, config.dtype, config.param_dtype = 320, "float32", "float32"
    model = fdl.build(config)
    hf.save(model, model.init(jax.random.key(1)), folder, dtype=dtype)
    texts = [path.read_text() for path in sorted(pathlib.Path("moejax/data").glob("*.py"))]
    spec = train_bpe(texts, 300).spec()
    model_json = spec["model"] | {
        "added_tokens": [
            {"id": 299, "content": "<|end|>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ]
    }
    (folder / "tokenizer.json").write_text(json.dumps(model_json))
    tokenizer = {"eos_token": "<|end|>"} | config_of_tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder
