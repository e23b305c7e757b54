"""Which samples are alike, and how the untuned model routes those that it gets right.

The table of RoMA (arXiv 2511.07419, section 3): computed once, before tuning; see `roma.py`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zipfile

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from moejax.errors import UserError

MAX_SALTS = 64  # tried, until the first halves of all keys differ
_CHUNK = 2048  # rows of the distance matrix at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """One entry per sample, sorted by the first key.

    Attributes:
      keys: `samples.document_keys` with this `salt`; the first are all different.
      means: each sample's neighbours' routing, averaged by their weights.
      spreads: the weighted variance of that routing around its mean, summed over its elements.
      layers: global indices of the layers of the routing.
    """

    keys: UInt32[np.ndarray, "2 N"]
    salt: int
    means: Float[np.ndarray, "N L E"]
    spreads: Float[np.ndarray, "N"]
    layers: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return self.means.shape[-1]

    def find(self, keys: UInt32[Array, "2 T"]) -> tuple[Int[Array, "T"], Bool[Array, "T"]]:
        """(entry, whether it is this sample's) for each key."""
        mine = jnp.asarray(self.keys)
        at = jnp.minimum(jnp.searchsorted(mine[0], keys[0]), mine.shape[1] - 1)
        return at, (mine[:, at] == keys).all(axis=0)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes a `.npz` file, whole or not at all."""
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        with part.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))
        part.replace(target)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> Neighbours:
        """Raises UserError where the file is missing or is none."""
        if not pathlib.Path(path).is_file():
            raise UserError(
                f"there is no file of neighbours {str(path)!r}: write it with `moejax neighbours`"
            )
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = {field.name: stored[field.name] for field in dataclasses.fields(cls)}
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{str(path)!r} cannot be read as what `moejax neighbours` writes: {error}"
            ) from error
        found |= {"salt": int(found["salt"]), "layers": tuple(found["layers"].tolist())}
        return cls(**found)


def nearest(
    embeddings: Float[np.ndarray, "N d"],
    successful: Bool[np.ndarray, "N"],
    *,
    k: int,
    sigma: float | None = None,
) -> tuple[Int[np.ndarray, "N k"], Float[np.ndarray, "N k"]]:
    """(neighbours, weights): the k nearest successful samples of each, itself excluded.

    The weight is the Gaussian similarity exp(-|e_i - e_j|^2 / (2 sigma^2)), divided by the sum
    over the k. The paper takes k = 3 and does not give sigma; None is the median distance to a
    neighbour.

    Raises UserError where there are not more than k successful samples.
    """
    candidates = np.flatnonzero(successful)
    if len(candidates) <= k:
        raise UserError(
            f"the model answers {len(candidates)} of {len(successful)} samples rightly; "
            f"{k} neighbours for each need at least {k + 1}: lower --k or give more samples"
        )
    points = embeddings.astype(np.float64)
    found, squares = [], []
    for start in range(0, len(points), _CHUNK):
        square = _squared_distances(points[start : start + _CHUNK], points[candidates])
        rows = np.arange(start, start + len(square))
        square[rows[:, None] == candidates] = np.inf
        order = np.argsort(square, axis=1, kind="stable")[:, :k]
        found.append(candidates[order])
        squares.append(np.take_along_axis(square, order, axis=1))
    square = np.concatenate(squares)
    width = sigma or float(np.median(np.sqrt(square))) or 1.0  # all alike: any width will do
    exponent = -square / (2 * width**2)
    similarity = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return np.concatenate(found), similarity / similarity.sum(axis=1, keepdims=True)


def _squared_distances(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    square = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.maximum(square, 0)


def averaged(
    routing: Float[np.ndarray, "N L E"],
    neighbours: Int[np.ndarray, "N k"],
    weights: Float[np.ndarray, "N k"],
) -> tuple[Float[np.ndarray, "N L E"], Float[np.ndarray, "N"]]:
    """(means, spreads) of the neighbours' routing; see `Neighbours`."""
    means = np.zeros(routing.shape, np.float32)
    spreads = np.zeros(len(routing), np.float32)
    for i, (others, weight) in enumerate(zip(neighbours, weights, strict=True)):
        own = routing[others].astype(np.float64)
        mean = np.tensordot(weight, own, axes=1)
        means[i] = mean
        spreads[i] = weight @ np.square(own - mean).sum((1, 2))
    return means, spreads
