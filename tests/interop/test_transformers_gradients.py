"""Gradients of one training step equal those of transformers: every tensor of every layer.

Torch's gradients are written as if they were weights and read through the same map as weights, so
that each is compared where its parameter is.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.interop import hf
from moejax.types import named_leaves
from moejax.verification.contracts.cases import quick_jit

torch = pytest.importorskip("torch", reason="the extra hf (torch) is not installed")
pytest.importorskip("transformers", reason="the extra hf is not installed")

from tests.interop.test_hf_transformers import (  # noqa: E402  (it imports torch)
    ARCHITECTURES,
    MASK,
    TOKENS,
    theirs,
)


def their_gradients(name, directory):
    """As variables of ours; parameters only."""
    model = copy.deepcopy(theirs(name))
    model.get_input_embeddings().padding_idx = None  # else that id's embedding gets no gradient
    labels = torch.from_numpy(np.where(MASK, TOKENS, -100))
    inputs = {"attention_mask": torch.from_numpy(MASK), "labels": labels}
    model(torch.from_numpy(TOKENS), **inputs).loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    model.save_pretrained(directory)
    return hf.load(directory)[1]["params"]


def our_logits(model, variables):
    return model.apply(
        variables, jnp.asarray(TOKENS), segment_ids=jnp.asarray(MASK, jnp.int32)
    ).logits


def our_loss(model, variables):
    logits = our_logits(model, variables)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
    return (losses * MASK[:, 1:]).sum() / MASK[:, 1:].sum()


def tensors_of(path, leaf) -> np.ndarray:
    """[tensors, entries]: one for each layer of a stacked leaf, and for each of its experts."""
    leaf = np.asarray(leaf)
    axes = 0 if not path.startswith("layers_") else 2 if "/experts/" in path else 1
    return leaf.reshape(int(np.prod(leaf.shape[:axes])), -1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_gradient_is_theirs(name, tmp_path):
    theirs(name).save_pretrained(tmp_path / "model")
    model, variables = hf.load(tmp_path / "model")
    state = {key: value for key, value in variables.items() if key != "params"}
    run = quick_jit(jax.grad(lambda params: our_loss(model, {"params": params} | state)))
    ours = named_leaves(run(variables["params"]))
    expected = named_leaves(their_gradients(name, tmp_path / "gradients"))
    assert ours.keys() == expected.keys()
    unused = 0
    for path in ours:
        a, b = tensors_of(path, ours[path]), tensors_of(path, expected[path])
        largest = np.abs(b).max(axis=1)
        error = np.abs(a - b).max(axis=1)
        # An expert that nobody chose has a gradient of exact zeros, here and there.
        unused += int((largest == 0).sum())
        assert (error[largest == 0] == 0).all(), path
        assert (error <= 1e-4 * largest).all(), f"{path}: {(error / largest).max()}"
    assert unused < 0.5 * sum(len(tensors_of(p, x)) for p, x in ours.items())


def test_a_wrong_gradient_would_be_noticed(tmp_path):
    """Weights taken from the loss of the tokens themselves, not of the next ones."""
    theirs("olmoe").save_pretrained(tmp_path / "model")
    model, variables = hf.load(tmp_path / "model")
    expected = named_leaves(their_gradients("olmoe", tmp_path / "gradients"))

    def unshifted(params):
        logits = our_logits(model, {"params": params})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS)
        return (losses * MASK).sum() / MASK.sum()

    wrong = named_leaves(quick_jit(jax.grad(unshifted))(variables["params"]))
    for path, value in expected.items():
        assert np.abs(wrong[path] - value).max() > 1e-2 * np.abs(value).max(), path
