"""A small checkpoint with a tokenizer, stored as transformers stores it."""

import json
import pathlib

import fiddle as fdl
import jax
import jax.numpy as jnp

from moejax.data.subword import train_bpe
from moejax.interop import hf
from tests.interop.tiny_checkpoints import written


def publish(
    folder: pathlib.Path, *, dtype: str, name: str = "olmoe", **config_of_tokenizer: object
) -> pathlib.Path:
    """A model of two layers, computed in float32, with a BPE of moejax's own source."""
    config = hf.model_config(written(name, folder.with_name("golden")))
    config.vocab_size, config.dtype, config.param_dtype = 320, "float32", "float32"
    model = fdl.build(config)
    variables = model.init(jax.random.key(1))
    biased = lambda x: jnp.broadcast_to(jnp.linspace(-0.1, 0.1, x.shape[-1]), x.shape)
    variables |= {"router_state": jax.tree.map(biased, variables.get("router_state", {}))}
    hf.save(model, variables, folder, dtype=dtype)
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
