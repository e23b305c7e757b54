"""Variables out of tensor files, one leaf at a time."""

from __future__ import annotations

import functools
import itertools
import logging
import re

import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.interop.mapping import Leaf
from moejax.interop.tensor_files import TensorFiles
from moejax.interop.views import Computed, copy_into
from moejax.types import at_least_f32

_log = logging.getLogger(__name__)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers in old files, which follow from the config.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|self_attn\.(masked_)?bias)")
_CHUNK = 4096  # rows that are compared at a time


class StoredLeaf:
    """A leaf as it lies in the files: `stored[index]` reads that slice of it and nothing else.

    `dtype` is the stored one; of layers that are stored in several, one that holds all exactly.
    Router state is in at least float32.

    Raises:
      UserError: a tensor is missing, or its shape or dtype is another.
    """

    def __init__(self, files: TensorFiles, leaf: Leaf):
        self.path, self.shape = leaf.path, leaf.shape
        self._tensors: dict[tuple[int, ...], np.ndarray | Computed] = {}
        for part in leaf.parts(files.names):
            if part.tensor not in files:
                raise UserError(f"{files.directory} lacks tensor {part.tensor} (for {leaf.path})")
            tensor = files.read(part.tensor, part.tensor_shape)
            self._tensors[part.index] = part.view(tensor)
        dtypes = {tensor.dtype for tensor in self._tensors.values()}
        dtype = functools.reduce(jnp.promote_types, dtypes)
        is_state = leaf.path.startswith("router_state/")
        self.dtype = np.dtype(at_least_f32(dtype) if is_state else dtype)

    def __getitem__(self, index: tuple[int | slice, ...]) -> np.ndarray:
        """The values at `index`: a number or a slice for every axis, or for the first ones."""
        as_slice = lambda part: part if isinstance(part, slice) else slice(part, part + 1)
        parts = itertools.zip_longest(map(as_slice, index), self.shape, fillvalue=slice(None))
        spans = [range(size)[part] for part, size in parts]
        numbers = tuple(0 if isinstance(part, int) else slice(None) for part in index)
        out = np.empty([len(span) for span in spans], self.dtype)
        depth = len(next(iter(self._tensors)))
        rest = tuple(slice(s.start, s.stop, s.step) for s in spans[depth:])
        for own in np.ndindex(out.shape[:depth]):
            where = tuple(span[i] for span, i in zip(spans, own, strict=False))
            copy_into(out[own], self._tensors[where][rest])
        return out[numbers]


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
