"""What PEFT gives a pair of matrices: linear modules, and the fused parameters of routed experts.

transformers 5 keeps the experts of a layer in two parameters, `gate_up_proj` and `down_proj`. For
such a parameter of E experts (`target_parameters`) PEFT stores A as `[R E, in]`, all of one
expert's rows together, and B as `[out, R E]`, all experts' columns of one rank together. Adapters
that were trained with transformers 4 have a module for every expert instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.errors import UserError
from moejax.interop.lora_factors import Projection, factor_a, factor_b, tensor_a, tensor_b
from moejax.interop.views import View

PREFIX = "base_model.model."
_WEIGHT = ".weight"

Pair = tuple[np.ndarray, np.ndarray]  # A and B, as torch's tensors or as our factors
Factors = Mapping[str, Pair]  # {path of a projection: its factors in one layer, or of one expert}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A linear module of a layer, or of one expert of it.

    Attributes:
      projections: whose factors its pair of matrices holds.
      tensor: the parameter that is adapted; `{layer}` and `{expert}` stand for numbers.
      expert: of a module that every expert has, the expert's.
      depth: how many wrappers are around the one that holds the pair.
    """

    projections: tuple[Projection, ...]
    tensor: str
    expert: int | None = None
    depth: int = 0

    @property
    def layer(self) -> int:
        """Global index."""
        return self.projections[0].layer

    @property
    def parameter(self) -> str:
        """As `target_parameters` names it."""
        return self.tensor.format(layer=self.layer, expert=self.expert)

    @property
    def module(self) -> str:
        """As `target_modules` names it."""
        return self.parameter.removesuffix(_WEIGHT)

    @property
    def within(self) -> str:
        """The parameter's name within its layer."""
        return self.tensor.split("{layer}.")[1]

    @property
    def keys(self) -> tuple[str, str]:
        """Names of A and B in the file."""
        path = f"{PREFIX}{self._wrapped}" + ".base_layer" * self.depth
        return f"{path}.lora_A.weight", f"{path}.lora_B.weight"

    @property
    def _wrapped(self) -> str:
        return self.module

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B, of stored rank `rank`."""
        one = self.projections[0]
        return (rank, one.d_in), (one.d_out, rank)

    def pack(self, factors: Factors, rank: int) -> Pair:
        """A and B as they are stored, in rank `rank`."""
        one = self.projections[0]
        a, b = factors[one.path]
        return tensor_a(a), tensor_b(b, self.view(one))

    def unpack(self, pair: Pair, rank: int) -> Factors:
        """The inverse of `pack`, for factors of rank `rank`."""
        one = self.projections[0]
        return {one.path: (factor_a(pair[0]), factor_b(pair[1], self.view(one)))}

    def view(self, one: Projection) -> View:
        """How the kernel of one of `projections` lies in the tensor."""
        return next(form.view for form in one.forms if form.tensor == self.tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedSite(Site):
    """A parameter of all experts of a layer, and of one or more projections of ours.

    Several projections share the stored A, if theirs are equal, or the stored rank is the sum of
    theirs: each has rows of A of its own, and B is zero where one's rows meet another's outputs.
    One projection may have a larger rank than is stored; what lies beyond is zero and stays so in
    training, because the gradient of either factor is a product with the other.
    """

    @property
    def _wrapped(self) -> str:
        return self.parameter.rpartition(".")[0]

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        one, rows = self.projections[0], rank * self._num_experts
        return (rows, one.d_in), (len(self.projections) * one.d_out, rows)

    def pack(self, factors: Factors, rank: int) -> Pair:
        pairs = [factors[one.path] for one in self.projections]
        if len(pairs) == 1:
            pairs = [(a[:, :, :rank], b[:, :rank]) for a, b in pairs]
        a, b = pairs[0]
        num_experts, own_rank, d_out = b.shape
        if rank > own_rank:
            a = np.concatenate([a for a, _ in pairs], axis=2)
        whole = np.zeros((num_experts, rank, len(pairs) * d_out), b.dtype)
        for part, (_, own) in enumerate(pairs):
            whole[:, self._rows(part, own_rank, rank), self._outputs(part)] = own
        stored = a.swapaxes(1, 2).reshape(num_experts * rank, -1)
        return stored, whole.transpose(2, 1, 0).reshape(-1, rank * num_experts)

    def unpack(self, pair: Pair, rank: int) -> Factors:
        """Raises UserError where projections that have rows of their own use each other's."""
        stored_a, stored_b = pair
        stored_rank = stored_a.shape[0] // self._num_experts
        a = stored_a.reshape(self._num_experts, stored_rank, -1).swapaxes(1, 2)
        b = stored_b.reshape(-1, stored_rank, self._num_experts).transpose(2, 1, 0)
        if stored_rank > rank and not self.is_separate(pair):
            raise UserError(
                f"{self.parameter} has rank {stored_rank}, of which gate and up do not have "
                f"{rank} each to themselves"
            )
        found = {}
        for part, one in enumerate(self.projections):
            rows = self._rows(part, rank, stored_rank)
            own_a, own_b = a[:, :, rows], b[:, rows, self._outputs(part)]
            beyond = (0, max(rank - stored_rank, 0))
            found[one.path] = (
                np.pad(own_a, ((0, 0), (0, 0), beyond)),
                np.pad(own_b, ((0, 0), beyond, (0, 0))),
            )
        return found

    def is_separate(self, pair: Pair) -> bool:
        """Whether every projection has rows of A that no other's outputs use."""
        parts, stored_rank = len(self.projections), pair[0].shape[0] // self._num_experts
        if parts < 2 or stored_rank % parts:
            return False
        b = pair[1].reshape(-1, stored_rank, self._num_experts).transpose(2, 1, 0)
        rank = stored_rank // parts
        own = np.zeros(b.shape[1:], bool)
        for part in range(parts):
            own[self._rows(part, rank, stored_rank), self._outputs(part)] = True
        return is_zero(b[:, ~own])

    @property
    def _num_experts(self) -> int:
        return self.projections[0].num_experts

    def _rows(self, part: int, rank: int, stored_rank: int) -> slice:
        return slice(part * rank, (part + 1) * rank) if stored_rank > rank else slice(None)

    def _outputs(self, part: int) -> slice:
        one = self.projections[part]
        return self.view(one).part(len(self.projections) * one.d_out)


def fused_sites(projections: Sequence[Projection]) -> list[Site]:
    """Where the pairs of these projections lie, experts' as transformers 5 has them.

    Raises UserError where one projection of a parameter is there and another is not.
    """
    plain: list[Site] = [_plain(one) for one in projections if one.num_experts is None]
    grouped: dict[tuple[int, str], list[Projection]] = {}
    for one in projections:
        if one.num_experts is not None:
            tensor = next(form.tensor for form in one.forms if not form.per_expert)
            grouped.setdefault((one.layer, tensor), []).append(one)
    # In the order in which transformers declares them, PEFT puts one wrapper around the other.
    order = sorted(grouped, key=lambda where: (where[0], "gate_up" not in where[1]))
    fused = []
    for layer, tensor in order:
        parts = grouped[layer, tensor]
        form = next(form for form in parts[0].forms if form.tensor == tensor)
        if len(parts) < form.view.num_parts:
            raise UserError(
                f"{parts[0].name} is adapted alone, but transformers keeps gate and up of the "
                f"experts in one parameter ({tensor.rpartition('.')[2]}), which PEFT adapts as a "
                "whole: name both in adapter.targets, or merge with `moejax export-hf`"
            )
        last = [where for where in order if where[0] == layer][-1]
        fused.append(
            FusedSite(
                projections=tuple(parts),
                tensor=tensor,
                depth=0 if (layer, tensor) == last else 1,
            )
        )
    return plain + fused


def sites_per_expert(projections: Sequence[Projection]) -> list[Site]:
    """Where the pairs of these projections lie, experts' as transformers 4 has them."""
    found = []
    for one in projections:
        form = next((form for form in one.forms if form.per_expert), None)
        if one.num_experts is None:
            found.append(_plain(one))
        elif form is not None:
            experts = range(one.num_experts)
            found += [Site(projections=(one,), tensor=form.tensor, expert=e) for e in experts]
    return found


def _plain(one: Projection) -> Site:
    return Site(projections=(one,), tensor=one.forms[0].tensor)


def is_zero(array: np.ndarray) -> bool:
    """Whether every bit is 0; a -0.0 would not survive where zeros are left out."""
    return not np.ascontiguousarray(array).view(f"u{array.itemsize}").any()


def equal_bits(arrays: Sequence[np.ndarray]) -> bool:
    """Whether arrays of one shape are the same, bit for bit."""
    bits = [np.ascontiguousarray(array).view(f"u{array.itemsize}") for array in arrays]
    return all(np.array_equal(bits[0], other) for other in bits[1:])
