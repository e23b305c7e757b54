"""The decoder-only language model: embedding, a stack of blocks, final norm, head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int

from moejax.errors import UserError
from moejax.layers.row_keys import row_keys
from moejax.models import decoding, stack, vocabulary
from moejax.models.adapter import Adapter
from moejax.models.block import Block
from moejax.models.moe import MoE
from moejax.models.output import Output, Variables
from moejax.models.settings import check_length, check_segments, check_settings
from moejax.models.variables import cast_floats
from moejax.types import Context, Stats, at_least_f32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transformer:
    """A decoder-only transformer with dense or MoE layers.

    Attributes:
      num_layers: L.
      d_model: width D.
      block: prototype of a layer; its `ffn` is an `MoE` or a dense MLP.
      dense_ffn: the feed-forward of dense layers, where the pattern below has any.
      first_k_dense: the first so many layers are dense (DeepSeek).
      moe_every: of the rest, every n-th is MoE, the last of each n (Qwen's decoder_sparse_step).
      windows: sliding windows in positions, cycled over the layers; None is full attention. A
        window of W sees the token itself and the W - 1 before it (as Hugging Face counts).
      last_k_full: the last so many layers attend every earlier key, in the same parameters: with
        `block.attention.full()` (MoBA's hybrid), and without a window.
      boundaries: layers at which a new run of stacked layers begins, beside those that the pattern
        asks for. Changes how parameters are stacked, and speed, not the result.
      max_length: longest sequence the model accepts, None for no limit.
      tied_head: the head is the transposed embedding.
      head_bias: a trained bias on the logits.
      embed_init, head_init: initialisers of the embedding `[V, D]` and the head `[D, V]`.
      embed_scale: multiplies the embeddings (Gemma: sqrt(D)).
      logit_soft_cap: c in c * tanh(logits / c), or None.
      dtype: of activations and matmuls. param_dtype: of stored parameters. Router, softmax,
        norms, logits and router state are at least float32 whatever these say.
      remat: a name in `stack.REMAT_POLICIES`. unroll: layers per scan iteration (speed only).
      vocab_size: V. adapter: what is added to projections. Both are left None in a config; the
        experiment sets them.
    """

    num_layers: int
    d_model: int
    block: Block
    dense_ffn: nn.Module | None = None
    first_k_dense: int = 0
    moe_every: int = 1
    windows: tuple[int | None, ...] = (None,)
    last_k_full: int = 0
    boundaries: tuple[int, ...] = ()
    max_length: int | None = None
    tied_head: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    embed_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    head_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    logit_soft_cap: float | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    remat: str = "none"
    unroll: int = 1
    vocab_size: int | None = None
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def is_dense(self, index: int) -> bool:
        """Whether layer `index` has no experts."""
        if index < self.first_k_dense:
            return True
        return (index - self.first_k_dense + 1) % self.moe_every != 0

    @functools.cached_property
    def segments(self) -> list[stack.Segment]:
        """The scanned runs of layers."""
        layers = [self._layer(i) for i in range(self.num_layers)]
        if self.adapter is not None:
            layers = self.adapter.attach(layers, *self._one_token())
        return stack.segments(layers)

    def at_step(self, step: int) -> Transformer:
        """The model as it computes at that step of training, without a switch.

        For evaluation and sampling, which know no step.
        """
        attention = self.block.attention
        if not hasattr(attention, "at_step"):
            return self
        block = self.block.clone(attention=attention.at_step(step))
        return dataclasses.replace(self, block=block)

    def _layer(self, index: int) -> stack.Layer:
        dense = self.is_dense(index)
        full = index >= self.num_layers - self.last_k_full
        window = None if full else self.windows[index % len(self.windows)]
        block = self.block.clone(ffn=self.dense_ffn) if dense else self.block
        block = block.clone(attention=block.attention.full()) if full else block
        run = sum(boundary <= index for boundary in self.boundaries)
        return stack.Layer(block=block, kind=(dense, window, run, full), window=window)

    @functools.cached_property
    def moe_layers(self) -> dict[int, tuple[str, int]]:
        """{global layer index: (segment name, row in its stack)} of the MoE layers, in order."""
        found = {}
        for segment in self.segments:
            for member, (name, layer) in enumerate(zip(segment.names, segment.layers, strict=True)):
                if isinstance(layer.block.ffn, MoE):
                    found |= {i: (name, row) for row, i in enumerate(segment.indices(member))}
        return dict(sorted(found.items()))

    @property
    def moe(self) -> MoE | None:
        """The MoE feed-forward, or None in a dense model."""
        dense = all(self.is_dense(i) for i in range(self.num_layers))
        return self.block.ffn if isinstance(self.block.ffn, MoE) and not dense else None

    def loss_weights(self) -> dict[str, float]:
        """{name of an auxiliary term: its weight in the loss}."""
        rules = self.moe.balance if self.moe is not None else ()
        adapters = {} if self.adapter is None else self.adapter.loss_weights
        return {rule.name: rule.weight for rule in rules if rule.name} | adapters

    # --- variables --------------------------------------------------------------------------

    def init(self, key: Array) -> Variables:
        """Fresh variables: `params`, and `router_state` and `lora` where there is any.

        Layer l's parameters come from fold_in(fold_in(key, 0), l); embedding and head from
        streams 1 and 2. They are drawn in float32 and stored in `param_dtype`; router state is
        stored in at least float32.
        """
        return nn.meta.unbox(self._init_boxed(key))

    def logical_axes(self) -> Variables:
        """The tree of `init` with each leaf's logical axis names instead of its value."""
        boxed = jax.eval_shape(self._init_boxed, jax.random.key(0))
        is_box = lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
        axes = lambda leaf: tuple(leaf.names) if is_box(leaf) else (None,) * leaf.ndim
        return jax.tree.map(axes, boxed, is_leaf=is_box)

    def _init_boxed(self, key: Array) -> Variables:
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set: the experiment takes it from a tokenizer")
        layers_key, embed_key, head_key = (jax.random.fold_in(key, s) for s in range(3))
        x, context = self._one_token()
        variables = stack.init(self.segments, layers_key, x, context)
        params, box = variables["params"], nn.LogicallyPartitioned
        embedding = self.embed_init(embed_key, (self.vocab_size, self.d_model), jnp.float32)
        params["embed"] = {"embedding": box(embedding, ("vocab", "embed"))}
        params["final_norm"] = self.block.norm.lazy_init(embed_key, x)["params"]
        head = {}
        if not self.tied_head:
            kernel = self.head_init(head_key, (self.d_model, self.vocab_size), jnp.float32)
            head["kernel"] = box(kernel, ("embed", "vocab"))
        if self.head_bias:
            head["bias"] = box(jnp.zeros((self.vocab_size,), jnp.float32), ("vocab",))
        params |= {"head": head} if head else {}
        variables.pop("cache", None)
        state_dtype = at_least_f32(self.param_dtype)
        dtypes = {"params": jnp.dtype(self.param_dtype), "router_state": state_dtype}
        return {c: cast_floats(tree, dtypes.get(c, state_dtype)) for c, tree in variables.items()}

    def _one_token(self) -> tuple[jax.ShapeDtypeStruct, Context]:
        """What traces every layer: shapes of variables do not depend on the batch."""
        one = jnp.ones((1, 1), jnp.int32)
        context = self._context(one, one, 0 * one, key=None, step=0)
        return jax.ShapeDtypeStruct((1, 1, self.d_model), jnp.float32), context

    # --- forward ----------------------------------------------------------------------------

    def apply(
        self,
        variables: Variables,
        tokens: Int[ArrayLike, "B S"],
        *,
        segment_ids: Int[ArrayLike, "B S"] | None = None,
        positions: Int[ArrayLike, "B S"] | None = None,
        step: Array | int = 0,
        key: Array | None = None,
        loads: dict[str, Array] | None = None,
        selection: dict[str, Array] | None = None,
        intervention: dict[str, Any] | None = None,
        task_ids: Int[ArrayLike, "B S"] | None = None,
        record: bool = False,
        cache_length: int | None = None,
    ) -> Output:
        """One forward pass.

        Args:
          variables: from `init`; with a collection `cache` to go on decoding, and only then.
          tokens: ids `[B, S]`. An id of V or more gives NaN, never another token's embedding.
          segment_ids: 0 is padding; attention stays within a segment. All ones by default. When
            decoding, a row is one segment.
          positions: within each segment; 0, 1, 2, ... along the row by default. Those of the slots
            when decoding with a cache, where there is no default (see `models/decoding.py`).
          step: the optimiser step, for schedules inside layers.
          key: for layers that sample, one or one for each row `[B]`; None: nothing is random.
          loads: global-batch shares per expert `{segment: [count, E]}`, from a first pass.
          selection: choices `{segment: [count, T, K]}` to replay instead of the routers' own.
          intervention: what changes the routers' logits, `{segment: one of
            moejax.interventions, each of its arrays [count, ...]}`.
          task_ids: which task a row belongs to, along the row, for adapters that route by it.
          record: puts the routing of every token into `stats`, as `trace` (see `MoE`).
          cache_length: slots of the decoding cache; given means decode with it.
        """
        check_length(self, tokens.shape[1])
        decode = cache_length is not None
        decoding.check_call(variables, decode=decode, positions=positions)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if key is not None and key.ndim == 0:
            key = row_keys(key, tokens.shape[0])
        context = self._context(tokens, segment_ids, positions, key=key, step=step)
        context = context.replace(
            decode=decode, cache_length=cache_length, record=record, task_ids=task_ids
        )
        follows = decoding.follow(variables.get("cache"), context) if decode else None
        params = variables["params"]
        x = vocabulary.embedded(params, tokens, dtype=self.dtype) * self.embed_scale
        per_layer = {"loads": loads, "selection": selection, "intervention": intervention}
        per_layer = {field: values or {} for field, values in per_layer.items()}
        check_segments(self, per_layer)
        passed = stack.apply(
            self.segments,
            variables,
            x,
            context,
            per_layer=per_layer,
            remat=self.remat,
            unroll=self.unroll,
        )
        passed = passed if follows is None else follows.of_sound_rows(passed)
        x = self.block.norm.apply({"params": params["final_norm"]}, passed.x)
        logits = vocabulary.logits(params, x, tied=self.tied_head, soft_cap=self.logit_soft_cap)
        return passed.output(logits)

    def _context(
        self,
        tokens: Int[ArrayLike, "B S"],
        segment_ids: Int[ArrayLike, "B S"],
        positions: Int[ArrayLike, "B S"],
        *,
        key: Array | None,
        step: Array | int,
    ) -> Context:
        return Context(
            token_mask=segment_ids > 0,
            segment_ids=segment_ids,
            positions=positions,
            token_ids=tokens,
            step=jnp.asarray(step, jnp.int32),
            key=key,
            router_carry=self._initial_carry(tokens.size),
        )

    def _initial_carry(self, num_tokens: int) -> Any:
        """What the first MoE layer's router gets from "the layer before", if routers hand on."""
        router = getattr(self.moe, "router", None)
        return router.initial_carry(num_tokens) if hasattr(router, "initial_carry") else None

    # --- decoding and router state ----------------------------------------------------------

    def init_cache(self, variables: Variables, batch_size: int, cache_length: int) -> Variables:
        """An empty decoding cache with `cache_length` slots per sequence."""
        check_length(self, cache_length)
        tokens = jnp.zeros((batch_size, 1), jnp.int32)
        run = lambda v: self.apply(v, tokens, cache_length=cache_length).cache
        shapes = jax.eval_shape(run, {k: v for k, v in variables.items() if k != "cache"})
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def update_router_state(
        self, router_state: Variables, stats: Stats, *, frozen: Collection[str] = ()
    ) -> Variables:
        """Every layer's next router state, from statistics summed over the optimiser step.

        `frozen`: the stacks of layers whose routers are (see `MoE.update_router_state`).
        """
        own = lambda name: functools.partial(self.moe.update_router_state, frozen=name in frozen)
        return {
            name: state | {"ffn": jax.vmap(own(name))(state["ffn"], stats[name])}
            for name, state in router_state.items()
        }
