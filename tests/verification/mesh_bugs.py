"""Bugs of sharding: what is split, summed or averaged over which devices."""

from tests.verification.planting import QUICK, Mutation

MESH = (
    Mutation(
        name="batch-spec-in-other-order",
        story="tokens leave by a batch spec with the axes in another order: they change places",
        file="parallel/token_shards.py",
        old="out_specs=(rows, PartitionSpec())",
        new="out_specs=(PartitionSpec(_TOKENS[::-1], None), PartitionSpec())",
        variant="data=2 expert=2",
        caught="loss",
    ),
    Mutation(
        name="expert-gradients-averaged",
        story="gradients of experts are divided by the devices that share the batch, like a mean",
        file="train/step.py",
        old="        grad_norm = global_norm(gradient)\n",
        new="        from moejax.optim.paths import map_named\n"
        "        from moejax.parallel.sharding import split_ways\n"
        "\n"
        "        ways = split_ways('expert')\n"
        "        mean = lambda path, g: g / ways if '/experts/' in path else g\n"
        "        gradient = map_named(mean, gradient)\n"
        "        grad_norm = global_norm(gradient)\n",
        variant="local on expert=4",
        caught="gradient layers_0/ffn/experts/down",
    ),
    Mutation(
        name="experts-of-last-microbatch",
        story="where experts are split, they learn from the last microbatch alone",
        file="train/step.py",
        old="add = lambda total, part: (jax.tree.map(jnp.add, total, one(part)), None)",
        new="from moejax.optim.paths import map_named\n"
        "        from moejax.parallel.sharding import split_ways\n"
        "\n"
        "        is_lost = lambda path: '/experts/' in path and split_ways('expert') > 1\n"
        "        kept = lambda total: map_named(lambda p, g: 0 * g if is_lost(p) else g, total)\n"
        "\n"
        "        def add(total, part):\n"
        "            total = (total[0], kept(total[1]), total[2])\n"
        "            return jax.tree.map(jnp.add, total, one(part)), None\n",
        variant="least_loaded, remat full, 2 microbatches, padding on expert=4",
        caught="gradient layers_0/ffn/experts/down",
    ),
    Mutation(
        name="norm-without-experts",
        story="the global gradient norm leaves out what expert parallelism splits",
        file="optim/optimizer.py",
        old="    return optax.tree.norm(_cast(tree))\n",
        new="    leaves = named_leaves(tree).items()\n"
        "    return optax.tree.norm(_cast([x for path, x in leaves if '/experts/' not in path]))\n",
        variant="local on expert=4",
        caught="global_norm of all gradients",
    ),
    Mutation(
        name="tensor-parts-averaged",
        story="partial results of tensor-parallel experts are averaged where they should be added",
        file="parallel/token_shards.py",
        old="y = lax.psum(y.astype(at_least_f32(y.dtype)), partial).astype(y.dtype)",
        new="y = lax.pmean(y.astype(at_least_f32(y.dtype)), partial).astype(y.dtype)",
        variant="local on expert=2 tensor=2",
        caught="loss",
    ),
    Mutation(
        name="bias-on-every-shard",
        story="the experts' output bias is added once per tensor shard",
        file="experts/glu.py",
        old='down=once(w["down_bias"], "expert_mlp")',
        new='down=w["down_bias"]',
        variant="local on expert=2 tensor=2",
        overrides=(*QUICK, "model.block.ffn.experts.use_bias=True"),
        caught="gradient layers_0/ffn/experts/down_bias",
    ),
    Mutation(
        name="seed-depends-on-mesh",
        story="every layout draws other initial weights",
        file="models/transformer.py",
        old="layers_key, embed_key, head_key = (jax.random.fold_in(key, s) for s in range(3))",
        new="from moejax.parallel.sharding import split_ways\n"
        "\n"
        "        key = jax.random.fold_in(key, split_ways('batch'))\n"
        "        layers_key, embed_key, head_key = (jax.random.fold_in(key, s) for s in range(3))",
        variant="data=4",
        caught="initial embed/embedding",
    ),
    Mutation(
        name="positions-by-shard",
        story="under context parallelism every shard counts positions from zero",
        file="models/transformer.py",
        old="        return Context(\n            token_mask=segment_ids > 0,",
        new="        from moejax.parallel.sharding import split_ways\n"
        "\n"
        "        positions = positions % max(tokens.shape[1] // split_ways('sequence'), 1)\n"
        "        return Context(\n            token_mask=segment_ids > 0,",
        variant="context=4",
        caught="loss",
    ),
    Mutation(
        name="queries-at-the-start-of-their-row",
        story="under context parallelism every shard's queries see as much as the first one's",
        file="parallel/context_parallel.py",
        old="lax.axis_index(_CONTEXT) * q.shape[1]",
        new="0",
        variant="context=4",
        caught="loss",
    ),
    Mutation(
        name="loss-per-shard",
        story="the loss is the mean over devices of means over their own tokens",
        file="objectives/lm.py",
        old="        count = mask.sum().astype(nll.dtype)\n",
        new="        from moejax.parallel.sharding import split_ways\n"
        "\n"
        "        count = mask.sum().astype(nll.dtype)\n"
        "        each = jnp.where(mask, log_normaliser - _logit_of(out.logits, batch.targets), 0)\n"
        "        parts = lambda v: v.reshape(split_ways('batch'), -1).sum(1)\n"
        "        nll = (parts(each) / parts(mask)).mean() * count\n",
        variant="data=4",
        caught="loss",
    ),
    Mutation(
        name="balance-per-shard",
        story="the balance loss takes each device's own shares for those of the global batch",
        file="balance/load_balance.py",
        old="            share = _share(choices(routing).sum(axis=0))\n",
        new="            from moejax.parallel.sharding import split_ways\n"
        "\n"
        "            shape = (split_ways('tokens'), -1, routing.probs.shape[-1])\n"
        "            own = _share(choices(routing).reshape(shape).sum(axis=1))\n"
        "            mask = context.token_mask.reshape(shape[:2])\n"
        "            return {self.name: _term(own, routing.probs.reshape(shape), mask)}\n",
        variant="data=4",
        caught="loss",
    ),
)
