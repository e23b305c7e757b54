"""The gradient of the language-modelling loss equals that of transformers, parameter by parameter.

Of each the norm and eight entries are stored (`tools/update_gradients.py`); with transformers at
hand, tests/interop/test_hf_transformers.py compares every entry.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit
from tests.models.test_hf_parity import GOLDEN, MODELS, _variables

STORED = np.load(GOLDEN / "gradients.npz")
NUM_ENTRIES = 8
# Compiling takes a processor five seconds each. These four have between them what the others have,
# but for groups scored by their maximum and a rotation of half a head.
OFTEN = ("olmoe", "qwen2_moe", "gpt_oss", "deepseek_v3")


def loss(model, variables, tokens):
    """Mean cross-entropy of the next token."""
    logits = model.apply(variables, tokens).logits[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def by_layer(model, params) -> dict[str, np.ndarray]:
    """{path with the layer's index in front: array} of parameters or their gradients."""
    rows = {
        name: segment.indices(member)
        for segment in model.segments
        for member, name in enumerate(segment.names)
    }
    out = {}
    for path, leaf in named_leaves(params).items():
        stack, _, rest = path.partition("/")
        if stack not in rows:
            out[path] = np.asarray(leaf)
            continue
        out |= {f"{i}/{rest}": np.asarray(leaf[row]) for row, i in enumerate(rows[stack])}
    return out


def entries(gradient: np.ndarray) -> np.ndarray:
    flat = gradient.ravel()
    return flat[np.linspace(0, flat.size - 1, NUM_ENTRIES).astype(int)]


def stored(name) -> dict[str, tuple[float, np.ndarray]]:
    """{path: (norm, entries)}."""
    paths = json.loads(str(STORED[f"{name}/paths"]))
    return {p: (row[0], row[1:]) for p, row in zip(paths, STORED[f"{name}/summaries"], strict=True)}


def test_every_architecture_is_stored():
    """Where this fails, run tools/update_gradients.py."""
    assert {key.split("/")[0] for key in STORED} == set(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.long) for n in MODELS]
)
def test_gradients_equal_transformers(name):
    golden, model = np.load(GOLDEN / f"{name}.npz"), MODELS[name]
    variables = _variables(model, golden)
    state = {key: value for key, value in variables.items() if key != "params"}
    run = quick_jit(jax.grad(lambda p, t: loss(model, {"params": p} | state, t)))
    ours = by_layer(model, run(variables["params"], jnp.asarray(golden["tokens"])))
    theirs = stored(name)
    assert ours.keys() == theirs.keys()
    for path, (norm, kept) in theirs.items():
        largest = np.abs(ours[path]).max()
        assert norm > 1e-4, f"{path}: too small to tell"
        np.testing.assert_allclose(np.linalg.norm(ours[path]), norm, rtol=1e-4, err_msg=path)
        np.testing.assert_allclose(
            entries(ours[path]), kept, rtol=0, atol=1e-4 * largest, err_msg=path
        )
