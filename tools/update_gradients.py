"""Writes tests/golden/gradients.npz from Hugging Face transformers (extra `bench`).

    python tools/update_gradients.py

For each tiny model of `update_golden.py` and its tokens: the gradient of the mean cross-entropy of
the next token, without auxiliary losses. Of every parameter of ours, layer by layer, the norm and
a few entries are kept, so that the file stays small.
"""

from __future__ import annotations

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers

from tools.golden_models import model_configs
from tools.golden_names import converted
from tools.update_golden import GOLDEN, drawn_model

NUM_ENTRIES = 8  # evenly spaced, the first and the last among them
_OUTSIDE = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "final_norm/scale",
    "model.norm.bias": "final_norm/bias",
    "lm_head.weight": "head/kernel",
    "lm_head.bias": "head/bias",
}


def gradients(config: transformers.PretrainedConfig, seed: int) -> dict[str, np.ndarray]:
    """{moejax path with the layer's index in front: gradient}."""
    model, _, tokens = drawn_model(config, seed)
    tokens = torch.from_numpy(tokens)
    # Else torch gives the embedding of that id no gradient, wherever it stands.
    model.get_input_embeddings().padding_idx = None
    model(tokens, labels=tokens).loss.backward()
    out = {}
    for key, parameter in model.named_parameters():
        value = parameter.grad.numpy()
        if key in _OUTSIDE:
            out[_OUTSIDE[key]] = value.T if key == "lm_head.weight" else value
            continue
        _, _, index, path = key.split(".", 3)
        out |= {f"{index}/{p}": v for p, v in converted(path, value, config).items()}
    return out


def summary(gradient: np.ndarray) -> np.ndarray:
    """[1 + NUM_ENTRIES]: the norm, then entries in C order."""
    flat = np.asarray(gradient, np.float64).ravel()
    kept = flat[np.linspace(0, flat.size - 1, NUM_ENTRIES).astype(int)]
    return np.array([np.linalg.norm(flat), *kept], np.float32)


def main() -> None:
    """Writes the fixture and says how large it is."""
    out = {}
    for seed, (name, config) in enumerate(model_configs().items()):
        found = gradients(config, seed)
        out[f"{name}/paths"] = np.array(json.dumps(list(found)))
        out[f"{name}/summaries"] = np.stack([summary(value) for value in found.values()])
    path = GOLDEN / "gradients.npz"
    np.savez_compressed(path, **out)
    print(f"{path.name:20} {path.stat().st_size:7} bytes")


if __name__ == "__main__":
    main()
