"""Variables out of tensor files, one leaf at a time."""

from __future__ import annotations

import functools
import logging
import re

import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.interop.mapping import Leaf
from moejax.interop.tensor_files import TensorFiles
from moejax.interop.views import copy_into
from moejax.models.output import Variables
from moejax.types import at_least_f32

_log = logging.getLogger(__name__)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers in old files, which follow from the config.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(masked_)?bias)")
_CHUNK = 4096  # rows that are compared at a time


def read_variables(files: TensorFiles, leaves: list[Leaf]) -> Variables:
    """The tree of variables; each leaf in its stored dtype, router state in at least float32.

    Raises:
      UserError: a tensor is missing, or its shape or dtype is another.
    """
    variables: Variables = {}
    for leaf in leaves:
        *parents, name = leaf.path.split("/")
        tree = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, variables)
        tree[name] = jnp.asarray(read_leaf(files, leaf))
    return variables


def read_leaf(files: TensorFiles, leaf: Leaf) -> np.ndarray:
    """One leaf; of layers that are stored in several dtypes, in one that holds all exactly."""
    parts = list(leaf.parts(files.names))
    for part in parts:
        if part.tensor not in files:
            raise UserError(f"{files.directory} lacks tensor {part.tensor} (for {leaf.path})")
    dtype = functools.reduce(jnp.promote_types, {files.dtype(part.tensor) for part in parts})
    if leaf.path.startswith("router_state/"):
        dtype = at_least_f32(dtype)
    out = np.empty(leaf.shape, dtype)
    for part in parts:
        copy_into(out[part.index], part.view(files.read(part.tensor, part.tensor_shape)))
    return out


def check_names(
    files: TensorFiles, leaves: list[Leaf], *, skipped: tuple[str, ...], tied: bool
) -> None:
    """Every tensor has a place in the model.

    Args:
      skipped: prefixes of names that are left out, with a note in the log.
      tied: the head may be stored beside the embedding that it equals.

    Raises:
      UserError: a tensor has none, or the head is not the embedding.
    """
    placed = {part.tensor for leaf in leaves for part in leaf.parts(files.names)}
    if tied and {_HEAD, _EMBEDDING} <= files.names:
        _check_tied(files)
        placed.add(_HEAD)
    left = sorted(name for name in files.names - placed if not _BUFFERS.fullmatch(name))
    unknown = [name for name in left if not name.startswith(skipped)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{files.file(unknown[0])} holds tensor {unknown[0]}{more}, which the model that "
            "config.json describes does not have"
        )
    if left:
        _log.warning(
            "%s: not loaded, as transformers does not either: %d tensors such as %s",
            files.directory,
            len(left),
            left[0],
        )


def _check_tied(files: TensorFiles) -> None:
    """The stored head holds the same values as the embedding."""
    shape = files.shape(_EMBEDDING)
    embedding, head = files.read(_EMBEDDING, shape), files.read(_HEAD, shape)
    for start in range(0, shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        if not np.array_equal(head[rows], embedding[rows]):
            raise UserError(
                f"{files.file(_HEAD)}: {_HEAD} differs from {_EMBEDDING}, but config.json says "
                "tie_word_embeddings=true: set it to false to keep both"
            )
